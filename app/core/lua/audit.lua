-- Find jobs that are in no place, which only a foreign hand can bring about, and put them where they belong.
-- ARGV: queue, how many to look at in a lane. Of many lanes some are looked at, drawn by chance. Returns the ids.
local queue, limit, found = ARGV[1], tonumber(ARGV[2]), {}
local alone = {}
for _, id in ipairs(redis.call('LRANGE', ALONE .. queue, 0, -1)) do alone[id] = true end
for _, list in ipairs(redis.call('SRANDMEMBER', RQ .. 'queues', 60)) do
  local lane = string.sub(list, #RQ + 7)
  local is_ours = queue_of(lane) == queue
  if is_ours then
    uncap(tenant_of(lane))
    if redis.call('EXISTS', WAITING .. lane) == 1 then line_up(lane) end
  end
  -- The oldest that wait are near the head; one that is further down is popped twice, and taken once.
  for _, id in ipairs(is_ours and redis.call('ZRANGE', WAITING .. lane, 0, limit - 1) or {}) do
    if not alone[id] and not redis.call('LPOS', list, id, 'MAXLEN', 1000) then
      redis.call('LPUSH', list, id)
      found[#found + 1] = id
    end
  end
  for _, entry in ipairs(is_ours and redis.call('ZRANGE', RQ .. 'wip:' .. lane, 0, 99) or {}) do
    local id, fence = string.match(entry, '^(.+):(%d+)$')
    local held = id and redis.call('HMGET', JOB .. id, 'status', 'fence') or {}
    if held[1] == 'processing' and held[2] == fence and not redis.call('ZSCORE', LEASES, id) then
      redis.call('ZADD', LEASES, now(), id)
      found[#found + 1] = id
    end
  end
end
return found
