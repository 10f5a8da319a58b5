-- Find the jobs of the dead: leases that have passed. The first death puts a job at the front of its queue, from the
-- second on it runs alone, and one that dies alone is poison. ARGV: limit, retention (ms), error (JSON), RQ's time.
-- Returns id, what became of it (requeued, alone, poison), id, ...
local at, result = now(), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', at, 'LIMIT', 0, tonumber(ARGV[1]))) do
  local job = redis.call('HMGET', JOB .. id, 'status', 'queue', 'alone', 'fence')
  if job[1] ~= 'processing' then
    redis.call('ZREM', LEASES, id)
  else
    local deaths = redis.call('HINCRBY', JOB .. id, 'deaths', 1)
    result[#result + 1] = id
    if job[3] == '1' then
      redis.call('ZREM', RQ .. 'wip:' .. job[2], id .. ':' .. job[4])
      redis.call('HINCRBY', JOB .. id, 'fence', 1)
      redis.call('HSET', JOB .. id, 'error', ARGV[3])
      redis.call('HSET', RQ .. 'job:' .. id, 'ended_at', ARGV[4])
      enter(id, 'failed', at, tonumber(ARGV[2]))
      result[#result + 1] = 'poison'
    else
      requeue(id, job[2], at, deaths >= 2)
      result[#result + 1] = deaths >= 2 and 'alone' or 'requeued'
    end
  end
end
return result
