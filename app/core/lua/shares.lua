-- Fair shares of a queue, before the prelude. A tenant's lanes of a queue are one share, named as its normal lane is.
-- Shares with jobs stand in a ring by virtual time: the denoiser's milliseconds they were given, divided by weight.
local DEFAULT_WORK = 1000 -- of a job about which nothing is known

-- A queue has a lane for each priority of each tenant; what concerns all of them is kept under the queue's own name.
local function queue_of(lane) return string.match(lane, '^[^:@]+') end
local function share_of(lane) return string.match(lane, '^[^:]+') end
local function tenant_of(lane) return string.match(lane, '@([^:]+)') or DEFAULT_TENANT end

-- What a job is expected to take: milliseconds of the denoiser, and rows of one forward.
local function work_of(job)
  local ms, rows = string.match(job.work or '', '^(%d+) (%d+)')
  return math.max(tonumber(ms or DEFAULT_WORK), 1), tonumber(rows or 1)
end

-- Give a lane's share its turns. Who was away goes on where the others are, or where it was if that is later.
local function line_up(lane)
  local queue, share = queue_of(lane), share_of(lane)
  if redis.call('ZSCORE', SHARES .. queue, share) then return end
  if redis.call('SISMEMBER', CAPPED .. tenant_of(lane), share) == 1 then return end
  local known = tonumber(redis.call('ZSCORE', RESTED .. queue, share) or '0')
  redis.call('ZREM', RESTED .. queue, share)
  redis.call('ZADD', SHARES .. queue, math.max(known, tonumber(redis.call('GET', VIRTUAL .. queue) or '0')), share)
end

-- Take a share out of the turns; its virtual time is kept for as long as it is ahead of the others.
local function rest(share, virtual)
  local queue = queue_of(share)
  redis.call('ZREM', SHARES .. queue, share)
  if virtual > tonumber(redis.call('GET', VIRTUAL .. queue) or '0') then
    redis.call('ZADD', RESTED .. queue, virtual, share)
  end
end

-- A share had its turn at `virtual` and takes `ms` of the denoiser.
local function charge_share(share, virtual, ms, weight)
  local queue = queue_of(share)
  redis.call('ZADD', SHARES .. queue, string.format('%.17g', virtual + ms / weight), share)
  if virtual > tonumber(redis.call('GET', VIRTUAL .. queue) or '0') then
    redis.call('SET', VIRTUAL .. queue, string.format('%.17g', virtual))
    redis.call('ZREMRANGEBYSCORE', RESTED .. queue, '-inf', string.format('%.17g', virtual))
  end
end

-- A tenant may run one more: its shares have turns again.
local function uncap(tenant)
  local shares = redis.call('SMEMBERS', CAPPED .. tenant)
  if #shares == 0 then return end
  redis.call('DEL', CAPPED .. tenant)
  for _, share in ipairs(shares) do
    line_up(share)
    redis.call('PUBLISH', WAKE, queue_of(share))
  end
end

local function add(key, field, amount)
  if redis.call('HINCRBY', key, field, amount) == 0 then redis.call('HDEL', key, field) end
end

-- Keep the sums of what waits and runs in a queue; `job` is as it was before it entered `status`.
local function keep_sums(job, status)
  local key, ms, rows = WORK .. queue_of(job.queue), work_of(job)
  if (job.status == 'queued') ~= (status == 'queued') then
    local sign = status == 'queued' and 1 or -1
    add(key, 'jobs', sign)
    add(key, 'waiting', sign * ms)
    add(key, job.queue, sign * ms)
  end
  if (job.status == 'processing') ~= (status == 'processing') then
    local sign = status == 'processing' and 1 or -1
    add(key, 'running', sign * ms)
    add(key, 'rows', sign * rows)
    if sign < 0 then uncap(job.tenant) end
  end
end
