-- Set some of a tenant's limits; an empty value gives it the service's own again. ARGV: tenant, name, value, ...
local tenant = ARGV[1]
for i = 2, #ARGV, 2 do
  if ARGV[i + 1] == '' then
    redis.call('HDEL', LIMITS .. tenant, ARGV[i])
  else
    redis.call('HSET', LIMITS .. tenant, ARGV[i], ARGV[i + 1])
  end
end
uncap(tenant)
return redis.call('HGETALL', LIMITS .. tenant)
