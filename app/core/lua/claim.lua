-- Pop the next job of one queue and take it, in one step: there is no moment at which a job is popped and unclaimed.
-- ARGV: worker, queue, lease (ms), '1' if the worker has nothing else in hand, RQ's time text.
-- Returns nil (nothing waits), {'drain'} (become empty first: a job that must run alone waits for you), or
-- {'job', id, fence, alone, fields...}.
local worker, queue, lease, idle, rq_time = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4] == '1', ARGV[5]
local list, waiting = RQ .. 'queue:' .. queue, WAITING .. queue
local at = now()

local function is_queued(id) return id and redis.call('HGET', JOB .. id, 'status') == 'queued' end

local function take(id, alone)
  local fence = redis.call('HINCRBY', JOB .. id, 'fence', 1)
  redis.call('HINCRBY', JOB .. id, 'tries', 1)
  redis.call('HSET', JOB .. id, 'worker', worker, 'started_at', at, 'alone', alone)
  redis.call('ZADD', LEASES, at + lease, id)
  enter(id, 'processing', at, 0)
  redis.call('HSET', RQ .. 'job:' .. id, 'worker_name', worker, 'started_at', rq_time)
  redis.call('ZADD', RQ .. 'wip:' .. queue, FAR, id .. ':' .. fence)
  local reply = {'job', id, fence, alone}
  for _, part in ipairs(redis.call('HGETALL', JOB .. id)) do reply[#reply + 1] = part end
  return reply
end

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

for _ = 1, 1000 do
  local id = redis.call('LMOVE', list, list .. ':intermediate', 'LEFT', 'RIGHT')
  if not id then
    -- RQ's list was emptied by another's hand while jobs wait: our own index is the truth.
    local lost = redis.call('ZRANGE', waiting, 0, 99)
    local alone = redis.call('LLEN', ALONE .. queue)
    if #lost <= alone then return nil end
    local held = {}
    for _, other in ipairs(redis.call('LRANGE', ALONE .. queue, 0, -1)) do held[other] = true end
    local pushed = 0
    for _, other in ipairs(lost) do
      if not held[other] then
        redis.call('RPUSH', list, other)
        pushed = pushed + 1
      end
    end
    if pushed == 0 then return nil end
  else
    redis.call('LREM', list .. ':intermediate', 0, id)
    if is_queued(id) then return take(id, '0') end
  end
end
return nil
