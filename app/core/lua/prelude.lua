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

local function hash(key)
  local flat, map = redis.call('HGETALL', key), {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

-- Write the webhook beside the status: the sender finds it even if every other process dies now.
local function enqueue_webhook(id, job, status, at)
  local kind = 'job.' .. status
  if not job.webhook_url or not string.find(',' .. job.webhook_events .. ',', ',' .. kind .. ',', 1, true) then
    return
  end
  local delivery = 'msg_' .. string.sub(id, 5) .. '_' .. status
  if redis.call('EXISTS', DELIVERY .. delivery) == 1 then return end
  local snapshot = hash(JOB .. id)
  snapshot.id = id
  redis.call('HSET', DELIVERY .. delivery, 'type', kind, 'created_at', at, 'attempts', 0,
             'url', job.webhook_url, 'tenant', job.tenant, 'job', cjson.encode(snapshot))
  redis.call('ZADD', OUTBOX, at, delivery)
  redis.call('PUBLISH', OUTBOX_BELL, delivery)
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
  enqueue_webhook(id, job, status, at)
end

-- Put a job that was processing back: nobody's commit for the old fence counts any more.
local function requeue(id, queue, at, alone)
  redis.call('ZREM', RQ .. 'wip:' .. queue, id .. ':' .. redis.call('HGET', JOB .. id, 'fence'))
  redis.call('HINCRBY', JOB .. id, 'fence', 1)
  redis.call('HDEL', JOB .. id, 'worker', 'progress', 'started_at')
  enter(id, 'queued', at, 0)
  if alone then
    redis.call('RPUSH', ALONE .. queue, id)
  else
    redis.call('LPUSH', RQ .. 'queue:' .. queue, id)
  end
  redis.call('PUBLISH', WAKE, queue)
end
