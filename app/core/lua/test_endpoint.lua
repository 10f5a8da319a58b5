-- Put a test for an endpoint into the outbox. ARGV: tenant, endpoint, delivery. Returns 1, or nil: no such endpoint.
local tenant, endpoint, id = ARGV[1], ARGV[2], ARGV[3]
local text = redis.call('HGET', ENDPOINTS .. tenant, endpoint)
if not text then return nil end
put_delivery(id, {type = 'endpoint.test', url = cjson.decode(text).url, tenant = tenant, endpoint = endpoint}, now())
return 1
