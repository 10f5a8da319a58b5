-- Bring a batch into being whose plan (the members, each as submit.lua takes it) lies ready: from here on it is promised.
-- ARGV: id, tenant, idempotency digest or '', fingerprint, retention (ms), fields of the batch (JSON object), how many
-- batches of a tenant may be open, how many bytes their plans may take, then the uploads that its members name. Returns
-- {outcome, id}; outcomes: created, existing, mismatch, many, heavy, torn, no_upload.
local id, tenant, digest, fingerprint, retention = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local idempotency = IDEMPOTENCY .. tenant .. ':' .. digest
if digest ~= '' then
  local known = redis.call('GET', idempotency)
  if known then
    local print, first = string.match(known, '^(%S+) (%S+)$')
    -- The same call again after a lost reply finds its own.
    if first ~= id then redis.call('UNLINK', BATCH_PLAN .. id) end
    return {print == fingerprint and 'existing' or 'mismatch', first}
  end
end
if redis.call('EXISTS', BATCH .. id) == 1 then return {'existing', id} end
local wanted = cjson.decode(ARGV[6])
if redis.call('LLEN', BATCH_PLAN .. id) ~= tonumber(wanted.total) then return {'torn', id} end
if redis.call('SCARD', BATCHES_OPEN .. tenant) >= tonumber(ARGV[7]) then
  redis.call('UNLINK', BATCH_PLAN .. id)
  return {'many', id}
end
local bytes = tonumber(wanted.plan_bytes)
for _, open in ipairs(redis.call('SMEMBERS', BATCHES_OPEN .. tenant)) do
  -- One that an earlier version made has no such field.
  bytes = bytes + tonumber(redis.call('HGET', BATCH .. open, 'plan_bytes') or 0)
end
if bytes > tonumber(ARGV[8]) then
  redis.call('UNLINK', BATCH_PLAN .. id)
  return {'heavy', id}
end
for i = 9, #ARGV do
  if redis.call('HGET', UPLOAD .. ARGV[i], 'tenant') ~= tenant then
    redis.call('UNLINK', BATCH_PLAN .. id)
    return {'no_upload', ARGV[i]}
  end
end

local created = unique_microseconds()
local at = math.floor(tonumber(created) / 1000)
local fields = {'tenant', tenant, 'created_us', created, 'status', 'creating'}
for name, value in pairs(wanted) do
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end
if digest ~= '' then
  fields[#fields + 1] = 'idempotency'
  fields[#fields + 1] = digest
  redis.call('SET', idempotency, fingerprint .. ' ' .. id, 'PX', retention)
end
redis.call('PERSIST', BATCH_PLAN .. id)
for i = 9, #ARGV do redis.call('SADD', UPLOAD_JOBS .. ARGV[i], id) end
redis.call('HSET', BATCH .. id, unpack(fields))
redis.call('ZADD', BATCHES .. tenant, created, id)
redis.call('SADD', BATCHES_OPEN .. tenant, id)
redis.call('ZADD', BATCH_WORK, created, id)
publish(id, 'status', cjson.encode({status = 'creating', at = at}))
return {'created', id}
