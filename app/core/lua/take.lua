-- Take due webhooks for a while: if this sender dies, another finds them due again.
-- ARGV: limit, hold (ms). Returns a list of {delivery id, fields...}.
local at, result = now(), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', OUTBOX, '-inf', at, 'LIMIT', 0, tonumber(ARGV[1]))) do
  local fields = redis.call('HGETALL', DELIVERY .. id)
  if #fields == 0 then
    redis.call('ZREM', OUTBOX, id)
  else
    redis.call('ZADD', OUTBOX, at + tonumber(ARGV[2]), id)
    redis.call('HINCRBY', DELIVERY .. id, 'attempts', 1)
    result[#result + 1] = {id, fields}
  end
end
return result
