-- Keep an endpoint where it is still as it was. ARGV: tenant, endpoint, its JSON as it was ('': a new one), its JSON, the
-- most that a tenant has. Returns 1, or 0: it has changed, is gone, or there are too many.
local key, endpoint, before, after, most = ENDPOINTS .. ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
if (redis.call('HGET', key, endpoint) or '') ~= before then return 0 end
if before == '' and redis.call('HLEN', key) >= most then return 0 end
redis.call('HSET', key, endpoint, after)
return 1
