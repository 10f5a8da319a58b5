-- How an attempt at an endpoint ended. ARGV: tenant, endpoint, ok | failed | gone, how long it may fail (ms).
-- Returns why it is disabled now, or nil.
local tenant, endpoint, outcome, patience = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local key, at = HEALTH .. endpoint, now()
if redis.call('HEXISTS', ENDPOINTS .. tenant, endpoint) == 0 then return nil end
if outcome == 'ok' then
  redis.call('HDEL', key, 'failures', 'failing_since', 'probe_at')
  return nil
end
redis.call('HINCRBY', key, 'failures', 1)
redis.call('HSETNX', key, 'failing_since', at)
local reason = nil
if outcome == 'gone' then reason = 'gone' end
if at - tonumber(redis.call('HGET', key, 'failing_since')) > patience then reason = reason or 'failing' end
if not reason or redis.call('HEXISTS', key, 'disabled') == 1 then return nil end
redis.call('HSET', key, 'disabled', reason, 'disabled_at', at)
return reason
