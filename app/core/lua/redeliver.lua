-- Send a delivery once more, its schedule from the start. ARGV: delivery, tenant.
-- Returns nil (no such delivery), 'changed' (it is no longer known what it said), or 'due'.
local id, tenant = ARGV[1], ARGV[2]
local key = DELIVERY .. id
local held = redis.call('HMGET', key, 'tenant', 'type', 'job_id', 'job', 'batch_id', 'batch')
if held[1] ~= tenant then return nil end
if held[3] and not held[4] then
  local job = hash(JOB .. held[3])
  if 'job.' .. (job.status or '') ~= held[2] then return 'changed' end
  job.id = held[3]
  redis.call('HSET', key, 'job', cjson.encode(job))
elseif held[5] and not held[6] then
  if redis.call('EXISTS', BATCH .. held[5]) == 0 then return 'changed' end
  redis.call('HSET', key, 'batch', snapshot_of(BATCH .. held[5], held[5]))
end
redis.call('PERSIST', key)
redis.call('HDEL', key, 'outcome', 'ended_at')
redis.call('HSET', key, 'attempts', 0, 'since', now())
redis.call('HINCRBY', key, 'turn', 1)  -- what a sender still does of the turn before ends nothing
redis.call('ZADD', OUTBOX, now(), id)
redis.call('PUBLISH', OUTBOX_BELL, id)
return 'due'
