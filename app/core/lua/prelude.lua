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

-- A queue has a lane for each priority; what concerns all of them is kept under the queue's own name.
local function queue_of(lane) return string.match(lane, '^[^:]+') end

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

-- Write the webhooks beside the status, one for each destination: the sender finds them even if every other process
-- dies now.
local function enqueue_webhooks(id, job, status, at)
  local kind, snapshot = 'job.' .. status, nil
  local function put(name, url, endpoint)
    if redis.call('EXISTS', DELIVERY .. name) == 1 then return end
    if not snapshot then
      local record = hash(JOB .. id)
      record.id = id
      snapshot = cjson.encode(record)
    end
    put_delivery(name, {type = kind, url = url, tenant = job.tenant, job = snapshot, job_id = id, endpoint = endpoint}, at)
    redis.call('SADD', JOB_DELIVERIES .. id, name)
  end

  if status == 'queued' then return end
  local name = 'msg_' .. string.sub(id, 5) .. '_' .. status
  if job.webhook_url and string.find(',' .. job.webhook_events .. ',', ',' .. kind .. ',', 1, true) then
    put(name, job.webhook_url, nil)
  end
  for endpoint, text in pairs(hash(ENDPOINTS .. job.tenant)) do
    local about = cjson.decode(text)
    for _, wanted in ipairs(about.events) do
      if wanted == kind and redis.call('HEXISTS', HEALTH .. endpoint, 'disabled') == 0 then
        put(name .. '_' .. endpoint, about.url, endpoint)
      end
    end
  end
end

-- What a tenant has used, by the day (of 86,400 s since the epoch).
local function charge(tenant, at, images, denoiser_seconds)
  local key, day = USAGE .. tenant, string.format('%d', math.floor(at / 86400000))
  redis.call('HINCRBY', key, day .. ':images', images)
  redis.call('HINCRBY', key, day .. ':denoiser_ms', math.floor(1000 * (tonumber(denoiser_seconds) or 0) + 0.5))
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
  if FINAL[status] then
    redis.call('HSET', key, 'completed_at', at)
    redis.call('HDEL', key, 'worker')
    redis.call('ZADD', RETENTION, at + retention, id)
    redis.call('HSET', key, 'expires_at', at + retention)
    redis.call('ZADD', RQ .. RQ_REGISTRY[status] .. job.queue, math.floor((at + retention) / 1000), id)
  end
  publish(id, 'status', cjson.encode({status = status, at = at}))
  publish_to_tenant(job.tenant, id, status, at)
  enqueue_webhooks(id, job, status, at)
end

-- Put a job that was processing back: nobody's commit for the old fence counts any more.
local function requeue(id, lane, at, alone, is_last)
  local fence = redis.call('HGET', JOB .. id, 'fence')
  abandon(id, fence, at)
  redis.call('ZREM', RQ .. 'wip:' .. lane, id .. ':' .. fence)
  redis.call('HINCRBY', JOB .. id, 'fence', 1)
  redis.call('HDEL', JOB .. id, 'worker', 'progress', 'started_at')
  enter(id, 'queued', at, 0)
  if alone then
    redis.call('RPUSH', ALONE .. queue_of(lane), id)
  else
    redis.call(is_last and 'RPUSH' or 'LPUSH', RQ .. 'queue:' .. lane, id)
  end
  redis.call('PUBLISH', WAKE, queue_of(lane))
end
