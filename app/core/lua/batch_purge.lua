-- Forget a batch whose retention has passed, by Redis' clock; its members have gone before. ARGV: id. Returns 1 or 0.
local id = ARGV[1]
local due = redis.call('ZSCORE', BATCH_RETENTION, id)
if not due or tonumber(due) > now() then return 0 end
forget_batch(id)
return 1
