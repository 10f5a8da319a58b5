-- Forget an upload; its object is swept after that. ARGV: id, 'asked' (by its owner) or 'expired'.
-- Asked for, it goes unless a job that has not ended uses it; expired, it stays while there is the record of one. A
-- batch uses it while its plan has members.
-- Returns 'gone', 'used', 'later', or nil: there is none.
local id = ARGV[1]
local upload = redis.call('HMGET', UPLOAD .. id, 'tenant', 'key', 'expires_at')
if not upload[1] then
  redis.call('ZREM', UPLOAD_EXPIRY, id)
  return nil
end
local function is_needed()
  for _, job in ipairs(redis.call('SMEMBERS', UPLOAD_JOBS .. id)) do
    local status = redis.call('HGET', JOB .. job, 'status')
    if not status and redis.call('EXISTS', BATCH_PLAN .. job) == 1 then status = 'queued' end
    if not status then
      redis.call('SREM', UPLOAD_JOBS .. id, job)
    elseif not FINAL[status] then
      return true
    end
  end
end
if ARGV[2] == 'asked' then
  if is_needed() then return 'used' end
elseif redis.call('EXISTS', UPLOAD_JOBS .. id) == 1 or tonumber(upload[3]) > now() then
  is_needed()
  prolong_upload(id, now() + 600000)
  return 'later'
end
redis.call('ZADD', STRAY_OBJECTS, now(), upload[2])
redis.call('DEL', UPLOAD .. id, UPLOAD_JOBS .. id)
redis.call('ZREM', UPLOADS .. upload[1], id)
redis.call('ZREM', UPLOAD_EXPIRY, id)
return 'gone'
