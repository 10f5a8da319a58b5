-- Queue the next members of a batch, as submit.lua queues any job. ARGV: id, how many at most, rules of admission (see
-- limits.lua) or '', retention (ms). What is refused for now stays in the plan, and nobody asks again before its time.
-- Returns {members queued, why no more are ('' or rate, waiting, overloaded), milliseconds to wait}; -1: nothing to do.
local id, limit, rules, retention = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local key, plan, at = BATCH .. id, BATCH_PLAN .. id, now()
local held = redis.call('HMGET', key, 'status', 'due', 'waits_for')
if held[1] ~= 'creating' then return {-1, '', 0} end
local wait = tonumber(held[2] or '0') - at
if wait > 0 then return {0, held[3], wait} end

local queued, reason = 0, ''
wait = 0
while queued < limit do
  local text = redis.call('LINDEX', plan, 0)
  if not text then break end
  local member = cjson.decode(text)
  member[8] = rules
  local reply = submit(member)
  if reply[1] == 'rate' or reply[1] == 'waiting' or reply[1] == 'overloaded' then
    reason, wait = reply[1], math.min(math.max(tonumber(reply[2]), 100), 10000)
    break
  end
  redis.call('LPOP', plan)
  queued = queued + 1
  if reply[1] ~= 'created' then -- what it was to be made from is gone
    redis.call('HINCRBY', key, 'n:failed', 1)
    publish(id, 'job', cjson.encode({index = tonumber(cjson.decode(member[7]).batch_index), status = 'failed', at = at}))
  end
end
if reason ~= '' then
  redis.call('HSET', key, 'due', at + wait, 'waits_for', reason)
else
  redis.call('HDEL', key, 'due', 'waits_for')
end
if redis.call('LLEN', plan) == 0 then
  redis.call('HSET', key, 'status', 'processing')
  redis.call('ZREM', BATCH_WORK, id)
  publish(id, 'status', cjson.encode({status = 'processing', at = at}))
  close_batch(id, at, retention)
end
return {queued, reason, wait}
