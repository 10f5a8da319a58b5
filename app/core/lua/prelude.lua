-- What every script shares. Times are milliseconds of Redis' clock; creation times are microseconds.
local FINAL = {succeeded = true, failed = true, canceled = true, expired = true}
local RQ_STATUS = {queued = 'queued', processing = 'started', succeeded = 'finished', failed = 'failed',
                   canceled = 'canceled', expired = 'canceled'}
local RQ_REGISTRY = {succeeded = 'finished:', failed = 'failed:', canceled = 'canceled:', expired = 'canceled:'}
-- RQ's clean-up, which even `rq info` runs, fails a started job whose score has passed: ours lies far away.
local FAR = 32503680000

local function now()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

-- An attempt that nobody will commit may have left objects; an hour from now no process of it can still be writing.
local function abandon(id, fence, at) redis.call('ZADD', ABANDONED, at + 3600000, id .. '/' .. fence) end

local function unique_microseconds()
  local t = redis.call('TIME')
  local at = tonumber(t[1]) * 1000000 + tonumber(t[2])
  local last = tonumber(redis.call('GET', CLOCK) or '0')
  if at <= last then at = last + 1 end
  local text = string.format('%.0f', at)
  redis.call('SET', CLOCK, text)
  return text
end

-- A list, not a stream: a stream's first node costs 4 kB, and a job's events are read by their number anyway.
local function publish(id, kind, data)
  local key = EVENTS .. id
  if kind ~= 'progress' or redis.call('LLEN', key) < 1000 then redis.call('RPUSH', key, kind .. ' ' .. data) end
  redis.call('PUBLISH', key, kind)
end

-- The statuses of all jobs of a tenant. This one is a stream, of which the oldest go; its ids count from 0-1.
local function publish_to_tenant(tenant, id, status, at)
  local key = TENANT_EVENTS .. tenant
  redis.call('XADD', key, 'MAXLEN', '~', 10000, '0-*', 'job', id, 'status', status, 'at', at)
  redis.call('PUBLISH', key, status)
end

local function hash(key)
  local flat, map = redis.call('HGETALL', key), {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

-- Add a line to a delivery's log, of which the latest lines are kept.
local function remember(key, line)
  local log = redis.call('HGET', key, 'log')
  log = log and log .. '\n' .. line or line
  while #log > 4096 do log = string.match(log, '\n(.*)$') or string.sub(line, 1, 4096) end
  redis.call('HSET', key, 'log', log)
end

-- Whether nobody has asked for a delivery again since it was taken in that turn; '' is any.
local function is_of_turn(key, turn)
  return turn == '' or (redis.call('HGET', key, 'turn') or '0') == turn
end

-- Keep an upload at least until then. Returns its record (field, value, ...), or nil where there is none.
local function prolong_upload(id, expires_at)
  local key = UPLOAD .. id
  local known = redis.call('HGET', key, 'expires_at')
  if not known then return nil end
  if tonumber(known) < expires_at then
    redis.call('HSET', key, 'expires_at', expires_at)
    redis.call('ZADD', UPLOAD_EXPIRY, expires_at, id)
  end
  return redis.call('HGETALL', key)
end

local function put_delivery(id, fields, at)
  local flat = {'created_at', at, 'attempts', 0}
  for name, value in pairs(fields) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  redis.call('HSET', DELIVERY .. id, unpack(flat))
  redis.call('ZADD', OUTBOX, at, id)
  redis.call('ZADD', DELIVERIES .. fields.tenant, at, id)
  redis.call('PUBLISH', OUTBOX_BELL, id)
end

-- Write an event's deliveries beside it, one for each destination: the sender finds them even if every other process
-- dies now. `url` is the one that the request named, or nil; `snapshot()` gives what the delivery is about, as fields.
local function enqueue_deliveries(name, kind, tenant, about, url, at, snapshot)
  local fields = nil
  local function put(delivery, to, endpoint)
    if redis.call('EXISTS', DELIVERY .. delivery) == 1 then return end
    fields = fields or snapshot()
    fields.type, fields.tenant, fields.url, fields.endpoint = kind, tenant, to, endpoint
    put_delivery(delivery, fields, at)
    redis.call('SADD', JOB_DELIVERIES .. about, delivery)
  end

  if url then put(name, url, nil) end
  for endpoint, text in pairs(hash(ENDPOINTS .. tenant)) do
    local registered = cjson.decode(text)
    for _, wanted in ipairs(registered.events) do
      if wanted == kind and redis.call('HEXISTS', HEALTH .. endpoint, 'disabled') == 0 then
        put(name .. '_' .. endpoint, registered.url, endpoint)
      end
    end
  end
end

-- What a delivery holds of a job or a batch, as it is now.
local function snapshot_of(key, id)
  local record = hash(key)
  record.id = id
  return cjson.encode(record)
end

local function enqueue_webhooks(id, job, status, at)
  if status == 'queued' then return end
  local kind = 'job.' .. status
  local is_wanted = job.webhook_url and string.find(',' .. job.webhook_events .. ',', ',' .. kind .. ',', 1, true)
  enqueue_deliveries('msg_' .. string.sub(id, 5) .. '_' .. status, kind, job.tenant, id,
                     is_wanted and job.webhook_url or nil, at,
                     function() return {job = snapshot_of(JOB .. id, id), job_id = id} end)
end

-- What a tenant has used, by the day (of 86,400 s since the epoch).
local function charge(tenant, at, images, denoiser_seconds)
  local key, day = USAGE .. tenant, string.format('%d', math.floor(at / 86400000))
  redis.call('HINCRBY', key, day .. ':images', images)
  redis.call('HINCRBY', key, day .. ':denoiser_ms', math.floor(1000 * (tonumber(denoiser_seconds) or 0) + 0.5))
end

-- A batch ends once all its members have, and none is still to be queued.
local function close_batch(id, at, retention)
  local key = BATCH .. id
  local held = redis.call('HMGET', key, 'status', 'total', 'n:succeeded', 'n:failed', 'n:canceled', 'n:expired', 'tenant')
  if held[1] ~= 'processing' and held[1] ~= 'canceling' then return end
  local ended = 0
  for i = 3, 6 do ended = ended + tonumber(held[i] or '0') end
  if ended < tonumber(held[2]) then return end
  -- One that was cancelled when all had been made already is complete.
  local status = held[1] == 'canceling' and tonumber(held[5] or '0') > 0 and 'canceled' or 'completed'
  redis.call('HSET', key, 'status', status, 'completed_at', at, 'expires_at', at + retention)
  redis.call('ZADD', BATCH_RETENTION, at + retention, id)
  redis.call('ZREM', BATCH_WORK, id)
  redis.call('SREM', BATCHES_OPEN .. held[7], id)
  publish(id, 'status', cjson.encode({status = status, at = at}))
  enqueue_deliveries('msg_' .. string.sub(id, 7) .. '_completed', 'batch.completed', held[7], id,
                     redis.call('HGET', key, 'webhook_url') or nil, at,
                     function() return {batch = snapshot_of(key, id), batch_id = id} end)
end

-- A member of a batch enters a status; `job` is as it was before.
local function enter_batch(id, job, status, at, retention)
  local batch = job.batch
  local key, members = BATCH .. batch, BATCH_JOBS .. batch
  if redis.call('EXISTS', key) == 0 then return end
  if job.status then
    redis.call('HINCRBY', key, 'n:' .. job.status, -1)
    redis.call('ZREM', members .. ':' .. job.status, id)
    publish(batch, 'job', cjson.encode({job = id, index = tonumber(job.batch_index), status = status, at = at}))
  else
    redis.call('ZADD', members, job.batch_index, id)
  end
  redis.call('HINCRBY', key, 'n:' .. status, 1)
  redis.call('ZADD', members .. ':' .. status, job.batch_index, id)
  if FINAL[status] then close_batch(batch, at, retention) end
end

-- The key may be another's by now: it ends a while after it was used, the record a while after the job has ended.
local function forget_key(tenant, digest, id)
  local key = digest and IDEMPOTENCY .. tenant .. ':' .. digest
  if key and string.sub(redis.call('GET', key) or '', -#id) == id then redis.call('DEL', key) end
end

local function forget_batch(id)
  local held = redis.call('HMGET', BATCH .. id, 'tenant', 'idempotency')
  redis.call('UNLINK', BATCH .. id, BATCH_PLAN .. id, BATCH_JOBS .. id, EVENTS .. id)
  for status in pairs(RQ_STATUS) do redis.call('UNLINK', BATCH_JOBS .. id .. ':' .. status) end
  redis.call('ZREM', BATCH_RETENTION, id)
  redis.call('ZREM', BATCH_WORK, id)
  if not held[1] then return end
  redis.call('ZREM', BATCHES .. held[1], id)
  redis.call('SREM', BATCHES_OPEN .. held[1], id)
  forget_key(held[1], held[2], id)
end

-- The one place a job's status changes: record, indexes, RQ's view, event and webhook together.
local function enter(id, status, at, retention)
  local key = JOB .. id
  local job = hash(key)
  if job.status then redis.call('ZREM', JOBS .. job.tenant .. ':' .. job.status, id) end
  redis.call('ZADD', JOBS .. job.tenant .. ':' .. status, job.created_us, id)
  redis.call('HSET', key, 'status', status)
  redis.call('HSET', RQ .. 'job:' .. id, 'status', RQ_STATUS[status])
  redis.call('ZREM', RQ .. 'wip:' .. job.queue, id .. ':' .. (job.fence or '0'))
  if status == 'queued' then
    redis.call('ZADD', WAITING .. job.queue, job.created_us, id)
  else
    redis.call('ZREM', WAITING .. job.queue, id)
  end
  if status ~= 'processing' then redis.call('ZREM', LEASES, id) end
  keep_sums(job, status)
  if FINAL[status] then
    redis.call('DEL', PREVIEWS .. id)
    redis.call('HSET', key, 'completed_at', at)
    redis.call('HDEL', key, 'worker')
    redis.call('ZADD', RETENTION, at + retention, id)
    redis.call('HSET', key, 'expires_at', at + retention)
    redis.call('ZADD', RQ .. RQ_REGISTRY[status] .. job.queue, math.floor((at + retention) / 1000), id)
  end
  publish(id, 'status', cjson.encode({status = status, at = at}))
  publish_to_tenant(job.tenant, id, status, at)
  enqueue_webhooks(id, job, status, at)
  if job.batch then enter_batch(id, job, status, at, retention) end
end

-- Put a job that was processing back: nobody's commit for the old fence counts any more.
local function requeue(id, lane, at, alone, is_last)
  local fence = redis.call('HGET', JOB .. id, 'fence')
  abandon(id, fence, at)
  redis.call('ZREM', RQ .. 'wip:' .. lane, id .. ':' .. fence)
  redis.call('HINCRBY', JOB .. id, 'fence', 1)
  redis.call('HDEL', JOB .. id, 'worker', 'progress', 'started_at')
  if not is_last then redis.call('HDEL', JOB .. id, 'unread_since') end
  enter(id, 'queued', at, 0)
  if alone then
    redis.call('RPUSH', ALONE .. queue_of(lane), id)
  else
    redis.call(is_last and 'RPUSH' or 'LPUSH', RQ .. 'queue:' .. lane, id)
    line_up(lane)
  end
  redis.call('PUBLISH', WAKE, queue_of(lane))
end
