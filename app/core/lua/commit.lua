-- Write a job's end, once, if the fence still holds.
-- ARGV: id, fence, status, retention (ms), fields (JSON object), RQ's time text.
-- Returns 'done', 'again' (this very commit was written before: its reply was lost) or 'lost'.
local id, fence, status, retention = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local held = redis.call('HMGET', JOB .. id, 'status', 'fence', 'committed')
if held[3] == fence then return 'again' end
if held[1] ~= 'processing' or held[2] ~= fence then return 'lost' end
local fields, written = {'committed', fence}, cjson.decode(ARGV[5])
for name, value in pairs(written) do
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end
redis.call('HSET', JOB .. id, unpack(fields))
redis.call('HSET', RQ .. 'job:' .. id, 'ended_at', ARGV[6])
local at = now()
local images = 0
for _, output in ipairs(cjson.decode(written.outputs or '[]')) do
  if output.role ~= 'grid' then images = images + 1 end
end
charge(redis.call('HGET', JOB .. id, 'tenant'), at, images, written.denoiser_seconds)
enter(id, status, at, retention)
return 'done'
