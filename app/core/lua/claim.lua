-- Pop the next job of one queue and take it, in one step: there is no moment at which a job is popped and unclaimed.
-- ARGV: worker, queue, lease (ms), '1' if the worker has nothing else in hand, RQ's time text, ticket, how many jobs a
-- tenant may run at once unless its own limit says otherwise (0: any number), then tenants whose turn is let pass.
-- The same ticket again means that the reply was lost: the job it took is given once more.
-- Returns nil (nothing waits), {'again'} (there were so many cancelled ids that this was enough for one step), {'drain'}
-- (become empty first: a job that must run alone waits for you), or {'job', id, fence, alone, fields...}.
local worker, queue, lease, idle, rq_time = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4] == '1', ARGV[5]
local ticket = ARGV[6]
local default_cap, passed = tonumber(ARGV[7] or 0), {}
for i = 8, #ARGV do passed[ARGV[i]] = true end
local at = now()

local function is_queued(id) return id and redis.call('HGET', JOB .. id, 'status') == 'queued' end

local function reply(id, fence, alone)
  local parts = {'job', id, fence, alone}
  for _, part in ipairs(redis.call('HGETALL', JOB .. id)) do parts[#parts + 1] = part end
  return parts
end

local function take(id, alone)
  local lane = redis.call('HGET', JOB .. id, 'queue')
  local fence = redis.call('HINCRBY', JOB .. id, 'fence', 1)
  redis.call('HINCRBY', JOB .. id, 'tries', 1)
  redis.call('HSET', JOB .. id, 'worker', worker, 'started_at', at, 'alone', alone)
  redis.call('ZADD', LEASES, at + lease, id)
  redis.call('SET', TICKET .. worker, ticket .. ' ' .. id .. ' ' .. fence, 'PX', lease)
  enter(id, 'processing', at, 0)
  redis.call('HSET', RQ .. 'job:' .. id, 'worker_name', worker, 'started_at', rq_time)
  redis.call('ZADD', RQ .. 'wip:' .. lane, FAR, id .. ':' .. fence)
  return reply(id, fence, alone)
end

local function taken_before()
  local known, id, fence = string.match(redis.call('GET', TICKET .. worker) or '', '^(%S+) (%S+) (%S+)$')
  if known ~= ticket then return nil end
  local held = redis.call('HMGET', JOB .. id, 'status', 'fence', 'alone')
  if held[1] ~= 'processing' or held[2] ~= fence then return nil end
  redis.call('ZADD', LEASES, at + lease, id)
  return reply(id, fence, held[3])
end

-- RQ's list was emptied by another's hand while jobs wait: our own index is the truth.
local function refill(lane)
  local alone, pushed = {}, 0
  for _, id in ipairs(redis.call('LRANGE', ALONE .. queue, 0, -1)) do alone[id] = true end
  for _, id in ipairs(redis.call('ZRANGE', WAITING .. lane, 0, 99)) do
    if not alone[id] then
      redis.call('RPUSH', RQ .. 'queue:' .. lane, id)
      pushed = pushed + 1
    end
  end
  return pushed > 0
end

local function pop(lane)
  local list = RQ .. 'queue:' .. lane
  for _ = 1, 1000 do
    local id = redis.call('LMOVE', list, list .. ':intermediate', 'LEFT', 'RIGHT')
    if id then
      redis.call('LREM', list .. ':intermediate', 0, id)
      if is_queued(id) then return id end
    elseif redis.call('EXISTS', WAITING .. lane) == 0 or not refill(lane) then
      return nil
    end
  end
  return 'again'
end

-- Of thirteen jobs of a share nine are from the high lane, three from the normal and one from the low one, while all
-- have some.
local function pop_share(share)
  local high, low = share .. ':high', share .. ':low'
  local turns = {high, high, high, share, high, high, high, share, high, high, high, share, low}
  local waiting = redis.call('EXISTS', WAITING .. high, WAITING .. share, WAITING .. low)
  if waiting == 0 then
    -- What is left in RQ's lists was cancelled.
    for _, lane in ipairs({high, share, low}) do redis.call('UNLINK', RQ .. 'queue:' .. lane) end
    return nil
  end
  local first = share
  if waiting > 1 then
    first = turns[redis.call('INCR', LANE_TURN .. share) % #turns + 1]
    redis.call('EXPIRE', LANE_TURN .. share, 86400)
  end
  for _, lane in ipairs({first, high, share, low}) do
    local id = pop(lane)
    if id then return id end
  end
end

-- The share that was given least, by its weight, has its turn. One without jobs, or whose tenant may run no more, leaves
-- the ring, so that nobody looks at it twice.
local function next_job()
  local place = 0
  while true do
    local first = redis.call('ZRANGE', SHARES .. queue, place, place, 'WITHSCORES')
    local share, virtual = first[1], tonumber(first[2])
    if not share then return nil end
    local tenant = tenant_of(share)
    local own = redis.call('HMGET', LIMITS .. tenant, 'max_running', 'weight')
    local cap = tonumber(own[1] or default_cap)
    if passed[tenant] then
      place = place + 1
    elseif cap > 0 and redis.call('ZCARD', JOBS .. tenant .. ':processing') >= cap then
      redis.call('SADD', CAPPED .. tenant, share)
      rest(share, virtual)
    else
      local id = pop_share(share)
      if id == 'again' then return id end
      if id then
        charge_share(share, virtual, work_of({work = redis.call('HGET', JOB .. id, 'work') or nil}), tonumber(own[2] or 1))
        return id
      end
      rest(share, virtual)
    end
  end
end

local before = taken_before()
if before then return before end

while redis.call('LLEN', ALONE .. queue) > 0 do
  local turn = redis.call('GET', ALONE_TURN .. queue)
  if turn and turn ~= worker then break end
  if not idle then
    redis.call('SET', ALONE_TURN .. queue, worker, 'PX', lease)
    return {'drain'}
  end
  local id = redis.call('LPOP', ALONE .. queue)
  if is_queued(id) then
    redis.call('DEL', ALONE_TURN .. queue)
    return take(id, '1')
  end
end

local id = next_job()
if id == 'again' then return {id} end
return id and take(id, '0')
