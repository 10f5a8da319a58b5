-- Find jobs that are in no place, which only a foreign hand can bring about, and put them where they belong.
-- ARGV: queue, how many to look at. Returns the ids.
local queue, limit, found = ARGV[1], tonumber(ARGV[2]), {}
local alone = {}
for _, id in ipairs(redis.call('LRANGE', ALONE .. queue, 0, -1)) do alone[id] = true end
for _, lane in ipairs({queue .. ':high', queue, queue .. ':low'}) do
  local list = RQ .. 'queue:' .. lane
  -- The oldest that wait are near the head; one that is further down is popped twice, and taken once.
  for _, id in ipairs(redis.call('ZRANGE', WAITING .. lane, 0, limit - 1)) do
    if not alone[id] and not redis.call('LPOS', list, id, 'MAXLEN', 1000) then
      redis.call('LPUSH', list, id)
      found[#found + 1] = id
    end
  end
  for _, entry in ipairs(redis.call('ZRANGE', RQ .. 'wip:' .. lane, 0, 99)) do
    local id, fence = string.match(entry, '^(.+):(%d+)$')
    local held = id and redis.call('HMGET', JOB .. id, 'status', 'fence') or {}
    if held[1] == 'processing' and held[2] == fence and not redis.call('ZSCORE', LEASES, id) then
      redis.call('ZADD', LEASES, now(), id)
      found[#found + 1] = id
    end
  end
end
return found
