-- Take due webhooks for a while: if this sender dies, another finds them due again. One for an endpoint goes where the
-- endpoint is now. ARGV: limit, hold (ms), failures that trip an endpoint, time between its probes (ms).
-- Returns a list of {delivery id, what stands in its way ('', gone, disabled, failing), fields...}.
local limit, hold, trip, probe = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local at, result = now(), {}

local function obstacle(tenant, endpoint, kind)
  local text = redis.call('HGET', ENDPOINTS .. tenant, endpoint)
  if not text then return 'gone' end
  local url = cjson.decode(text).url
  if kind == 'endpoint.test' then return '', url end
  local held = redis.call('HMGET', HEALTH .. endpoint, 'disabled', 'failures', 'probe_at')
  if held[1] then return 'disabled', url end
  if tonumber(held[2] or '0') >= trip then
    if tonumber(held[3] or '0') > at then return 'failing', url end
    redis.call('HSET', HEALTH .. endpoint, 'probe_at', at + probe)
  end
  return '', url
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', OUTBOX, '-inf', at, 'LIMIT', 0, tonumber(limit))) do
  local key = DELIVERY .. id
  local known = redis.call('HMGET', key, 'tenant', 'endpoint', 'type')
  if redis.call('EXISTS', key) == 0 then
    redis.call('ZREM', OUTBOX, id)
  else
    redis.call('ZADD', OUTBOX, at + hold, id)
    redis.call('HINCRBY', key, 'attempts', 1)
    local state, url = '', nil
    if known[1] and known[2] then state, url = obstacle(known[1], known[2], known[3]) end
    if url then redis.call('HSET', key, 'url', url) end
    result[#result + 1] = {id, state, redis.call('HGETALL', key)}
  end
end
return result
