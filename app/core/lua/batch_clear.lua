-- Go on cancelling the members of a batch that is being cancelled or deleted. ARGV: id, how many at most, retention (ms).
-- A deleted batch's members are then due for the sweep, which removes their objects and records; its own record goes last.
-- Returns how many members were dealt with (-1: there is nothing to do), then the queues of those that were cancelled.
local id, limit, retention = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local key, at, done, queues = BATCH .. id, now(), 0, {}
local held = redis.call('HMGET', key, 'status', 'tenant')
local status, tenant = held[1], held[2]
if status ~= 'canceling' and status ~= 'deleting' then
  redis.call('ZREM', BATCH_WORK, id)
  return {-1}
end
for _, from in ipairs({'queued', 'processing'}) do
  local open = BATCH_JOBS .. id .. ':' .. from
  for _, job in ipairs(redis.call('ZRANGE', open, 0, limit - done - 1)) do
    local lane = redis.call('HGET', JOB .. job, 'queue')
    if cancel({job, tenant, retention}) == 'canceled' then queues[#queues + 1] = queue_of(lane) end
    redis.call('ZREM', open, job)
    done = done + 1
  end
  if done >= limit then return {done, unpack(queues)} end
end
if status == 'canceling' then
  redis.call('ZREM', BATCH_WORK, id)
  close_batch(id, at, retention)
  return {done, unpack(queues)}
end
local members = redis.call('ZRANGE', BATCH_JOBS .. id, 0, limit - done - 1)
for _, job in ipairs(members) do
  redis.call('ZADD', RETENTION, 'XX', 0, job)
  redis.call('ZREM', BATCH_JOBS .. id, job)
end
if redis.call('EXISTS', BATCH_JOBS .. id) == 0 then forget_batch(id) end
return {done + #members, unpack(queues)}
