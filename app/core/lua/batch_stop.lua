-- Cancel a batch: no member is queued from here on; those that were are cancelled by batch_clear.lua, some at a time.
-- ARGV: id, tenant, 'canceling' or 'deleting' (nobody sees it any more), retention (ms). Returns its status, or nil.
local id, tenant, wanted, retention = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local key, at = BATCH .. id, now()
local held = redis.call('HMGET', key, 'tenant', 'status', 'idempotency')
if held[1] ~= tenant or held[2] == 'deleting' then return nil end
local is_open = held[2] ~= 'completed' and held[2] ~= 'canceled'
if wanted == 'canceling' and (not is_open or held[2] == 'canceling') then return held[2] end
local left = redis.call('LLEN', BATCH_PLAN .. id)
if left > 0 then redis.call('HINCRBY', key, 'n:canceled', left) end
redis.call('UNLINK', BATCH_PLAN .. id)
redis.call('HDEL', key, 'due', 'waits_for')
redis.call('HSET', key, 'status', wanted)
redis.call('ZADD', BATCH_WORK, redis.call('HGET', key, 'created_us'), id)
publish(id, 'status', cjson.encode({status = wanted, at = at}))
if wanted == 'deleting' then
  forget_key(tenant, held[3], id)
  redis.call('ZREM', BATCHES .. tenant, id)
  redis.call('SREM', BATCHES_OPEN .. tenant, id)
  redis.call('ZREM', BATCH_RETENTION, id)
else
  close_batch(id, at, retention)
end
return redis.call('HGET', key, 'status')
