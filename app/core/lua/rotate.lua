-- Change a tenant's webhook secret; the one before is valid for a while. ARGV: tenant, new one, overlap (ms), the one in
-- use if none is kept.
local key = WEBHOOK_SECRETS .. ARGV[1]
local before = redis.call('HGET', key, 'current') or ARGV[4]
redis.call('HSET', key, 'current', ARGV[2], 'previous', before, 'until', now() + tonumber(ARGV[3]))
return 1
