-- Find the jobs of the dead: leases that have passed. The first death puts a job at the front of its lane, from the
-- second on it runs alone, and one that dies alone twice is poison. ARGV: limit, retention (ms), error (JSON), RQ's time.
-- Returns id, what became of it (requeued, alone, poison), id, ...
local ALONE_FROM, POISON_FROM = 2, 4
local at, result = now(), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', at, 'LIMIT', 0, tonumber(ARGV[1]))) do
  local job = redis.call('HMGET', JOB .. id, 'status', 'queue', 'alone', 'fence')
  if job[1] ~= 'processing' then
    redis.call('ZREM', LEASES, id)
  else
    local deaths = redis.call('HINCRBY', JOB .. id, 'deaths', 1)
    redis.call('HSET', JOB .. id, 'died', job[4])
    result[#result + 1] = id
    if job[3] == '1' and deaths >= POISON_FROM then
      redis.call('ZREM', RQ .. 'wip:' .. job[2], id .. ':' .. job[4])
      redis.call('HINCRBY', JOB .. id, 'fence', 1)
      redis.call('HSET', JOB .. id, 'error', ARGV[3])
      redis.call('HSET', RQ .. 'job:' .. id, 'ended_at', ARGV[4])
      abandon(id, job[4], at)
      enter(id, 'failed', at, tonumber(ARGV[2]))
      result[#result + 1] = 'poison'
    else
      requeue(id, job[2], at, deaths >= ALONE_FROM)
      result[#result + 1] = deaths >= ALONE_FROM and 'alone' or 'requeued'
    end
  end
end
return result
