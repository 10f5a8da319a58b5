-- Look for an upload, and keep it longer where it is there. Where it is not, its object's key is to be swept in an hour
-- unless put_upload names it first. ARGV: id, tenant, retention (ms), key, the most uploads of a tenant.
-- Returns the record (field, value, ...), 'full', or nil: store the object.
local id, tenant, retention = ARGV[1], ARGV[2], tonumber(ARGV[3])
local known = prolong_upload(id, now() + retention)
if known then return known end
if redis.call('ZCARD', UPLOADS .. tenant) >= tonumber(ARGV[5]) then return 'full' end
redis.call('ZADD', STRAY_OBJECTS, now() + 3600000, ARGV[4])
return nil
