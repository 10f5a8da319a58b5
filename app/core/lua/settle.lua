-- A delivery has ended. ARGV: delivery, outcome, line of its log (JSON), keep (ms), longest life (ms), its turn or ''.
-- Returns 0 where it is gone, or was asked for again since it was taken.
-- What it said goes when somebody has it: the job's record says the same. What nobody has may be sent again by hand.
local id, outcome, line, keep, life = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local key, at = DELIVERY .. id, now()
if not is_of_turn(key, ARGV[6]) then
  remember(key, line)
  return 0
end
redis.call('ZREM', OUTBOX, id)
local held = redis.call('HMGET', key, 'tenant', 'job_id', 'batch_id')
if not held[1] then
  redis.call('DEL', key)
  return 0
end
remember(key, line)
redis.call('HSET', key, 'outcome', outcome, 'ended_at', at)
if outcome == 'delivered' then redis.call('HDEL', key, 'job', 'batch') end
redis.call('PEXPIRE', key, keep)
redis.call('ZREMRANGEBYSCORE', DELIVERIES .. held[1], '-inf', at - keep - life)
local about = held[2] or held[3]
if about then redis.call('PEXPIRE', JOB_DELIVERIES .. about, keep + life) end
return 1
