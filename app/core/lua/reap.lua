-- Find the jobs of the dead: leases that have passed. The first death puts a job at the front of its lane, from the
-- second on it runs alone, and the third, which it dies alone, is poison; docs/adr/0020 says which deaths count.
-- ARGV: limit, retention (ms), error (JSON), RQ's time. Returns id, what became of it (requeued, alone, poison), id, ...
local ALONE_FROM, POISON_FROM, CHANCES = 2, 3, 3

-- Whether any of a job's pictures was where it, or another, was at the death before; where that was may be unknown.
local function is_same_place(walk, before)
  if not before then return true end
  local places = string.gmatch(before, '[^,]+')
  for place in string.gmatch(walk, '[^,]+') do
    if place == places() then return true end
  end
  return false
end

-- What a death says of a job ('counts', 'chance' or 'nothing'), and where in its walk it was, if that is known.
local function judge(job)
  local fence, walk = string.match(job.walk or '', '^(%d+) (.+)$')
  if fence ~= job.fence then walk = nil end
  if walk == 'made' then return 'nothing', nil end
  local deaths = tonumber(job.deaths or 0)
  -- What speaks for a job is believed three times: a worker may write no marks, a job may end it here and there.
  if deaths == 0 or tonumber(job.chances or 0) >= CHANCES then return 'counts', walk end
  if not walk then return 'chance', nil end
  local is_proof = job.alone == '1' and deaths + 1 >= POISON_FROM
  return (is_proof and not is_same_place(walk, job.died_at)) and 'chance' or 'counts', walk
end

local at, result = now(), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', at, 'LIMIT', 0, tonumber(ARGV[1]))) do
  local job = hash(JOB .. id)
  if job.status ~= 'processing' then
    redis.call('ZREM', LEASES, id)
  else
    local verdict, walk = judge(job)
    local deaths = tonumber(job.deaths or 0)
    if verdict == 'counts' then
      deaths = redis.call('HINCRBY', JOB .. id, 'deaths', 1)
      redis.call('HSET', JOB .. id, 'died', job.fence)
    elseif verdict == 'chance' then
      redis.call('HINCRBY', JOB .. id, 'chances', 1)
    end
    if walk then redis.call('HSET', JOB .. id, 'died_at', walk) end
    result[#result + 1] = id
    if verdict == 'counts' and job.alone == '1' and deaths >= POISON_FROM then
      redis.call('ZREM', RQ .. 'wip:' .. job.queue, id .. ':' .. job.fence)
      redis.call('HINCRBY', JOB .. id, 'fence', 1)
      redis.call('HSET', JOB .. id, 'error', ARGV[3])
      redis.call('HSET', RQ .. 'job:' .. id, 'ended_at', ARGV[4])
      abandon(id, job.fence, at)
      enter(id, 'failed', at, tonumber(ARGV[2]))
      result[#result + 1] = 'poison'
    else
      requeue(id, job.queue, at, deaths >= ALONE_FROM)
      result[#result + 1] = deaths >= ALONE_FROM and 'alone' or 'requeued'
    end
  end
end
return result
