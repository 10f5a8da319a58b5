-- ARGV: id, tenant, lane, idempotency digest or '', fingerprint, retention (ms), fields of the job (JSON object),
-- rules of admission (JSON object, see limits.lua) or '' for a job that was let in before, then RQ's job: field,
-- value, ... (flat). Returns {outcome, id}; outcomes: created, existing, mismatch, no_upload; or why it is refused (rate,
-- waiting, overloaded) and how long to wait (ms) as the id. By the rules it returns the bucket too: its size, what is in
-- it, and milliseconds until it is full.
local id, tenant, queue, digest, fingerprint = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local retention = tonumber(ARGV[6])
local idempotency = IDEMPOTENCY .. tenant .. ':' .. digest
if digest ~= '' then
  local known = redis.call('GET', idempotency)
  if known then
    local print, first = string.match(known, '^(%S+) (%S+)$')
    if print ~= fingerprint then return {'mismatch', first} end
    return {'existing', first}
  end
end
-- The same call again after a lost reply.
if redis.call('EXISTS', JOB .. id) == 1 then return {'existing', id} end

local wanted, sources = cjson.decode(ARGV[7]), {}
for upload in string.gmatch(wanted.uploads or '', '[^,]+') do
  local about = redis.call('HMGET', UPLOAD .. upload, 'tenant', 'key')
  if about[1] ~= tenant then return {'no_upload', upload} end
  sources[#sources + 1] = upload .. '=' .. about[2]
end
if #sources > 0 then wanted.uploads = table.concat(sources, ',') end

local bucket = {}
if ARGV[8] ~= '' then
  local reason, wait, size, tokens, full = admit(tenant, 1, work_of(wanted), cjson.decode(ARGV[8]))
  bucket = {size, tokens, full}
  if reason ~= '' then return {reason, wait, unpack(bucket)} end
end

local created = unique_microseconds()
local at = math.floor(tonumber(created) / 1000)
-- Counters begin to exist when they count: a million waiting jobs have a million of these records.
local fields = {'tenant', tenant, 'queue', queue, 'created_us', created}
for name, value in pairs(wanted) do
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end
local seconds = tonumber(wanted.deadline_seconds)
if seconds then
  local deadline = at + math.floor(1000 * seconds)
  fields[#fields + 1] = 'deadline_at'
  fields[#fields + 1] = deadline
  redis.call('ZADD', DEADLINES, deadline, id)
end
if digest ~= '' then
  fields[#fields + 1] = 'idempotency'
  fields[#fields + 1] = digest
  redis.call('SET', idempotency, fingerprint .. ' ' .. id, 'PX', retention)
end
redis.call('HSET', JOB .. id, unpack(fields))
for upload in string.gmatch(wanted.uploads or '', 'upload_%w+') do redis.call('SADD', UPLOAD_JOBS .. upload, id) end
redis.call('HSET', RQ .. 'job:' .. id, unpack(ARGV, 9))
redis.call('SADD', RQ .. 'queues', RQ .. 'queue:' .. queue)
redis.call('ZADD', JOBS .. tenant, created, id)
enter(id, 'queued', at, retention)
redis.call('RPUSH', RQ .. 'queue:' .. queue, id)
line_up(queue)
redis.call('PUBLISH', WAKE, queue_of(queue))
return {'created', id, unpack(bucket)}
