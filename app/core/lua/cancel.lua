-- Cancel a job, whatever it is doing. ARGV: id, tenant, retention (ms). Returns the status it has now, or nil.
local id, tenant, retention = ARGV[1], ARGV[2], tonumber(ARGV[3])
local held = redis.call('HMGET', JOB .. id, 'tenant', 'status', 'fence', 'queue')
if held[1] ~= tenant then return nil end
if FINAL[held[2]] then return held[2] end
if held[2] == 'processing' then
  redis.call('ZREM', RQ .. 'wip:' .. held[4], id .. ':' .. held[3])
  abandon(id, held[3], now())
  redis.call('HINCRBY', JOB .. id, 'fence', 1)
end
enter(id, 'canceled', now(), retention)
redis.call('PUBLISH', CONTROL, id)
return 'canceled'
