-- Name an object that was stored. Who comes second takes what the first one named, and its own object is swept.
-- ARGV: id, tenant, retention (ms), key, width, height, bytes, sha256. Returns the record (field, value, ...).
local id, tenant, retention, key = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local known = prolong_upload(id, now() + retention)
if known then
  redis.call('ZADD', STRAY_OBJECTS, now(), key)
  return known
end
local created = unique_microseconds()
redis.call('HSET', UPLOAD .. id, 'tenant', tenant, 'key', key, 'width', ARGV[5], 'height', ARGV[6], 'bytes', ARGV[7],
           'sha256', ARGV[8], 'created_us', created, 'expires_at', 0)
redis.call('ZADD', UPLOADS .. tenant, created, id)
redis.call('ZREM', STRAY_OBJECTS, key)
return prolong_upload(id, now() + retention)
