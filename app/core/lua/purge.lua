-- Forget a finished job: record, events, indexes, idempotency key. Its webhooks carry a snapshot and stay.
-- ARGV: id. Returns 1, or 0 where there is none or it has not ended.
local id = ARGV[1]
local job = hash(JOB .. id)
if not job.status then
  redis.call('ZREM', RETENTION, id)
  return 0
end
if not FINAL[job.status] then return 0 end
redis.call('DEL', JOB .. id, EVENTS .. id, RQ .. 'job:' .. id)
redis.call('ZREM', JOBS .. job.tenant, id)
redis.call('ZREM', JOBS .. job.tenant .. ':' .. job.status, id)
redis.call('ZREM', RQ .. RQ_REGISTRY[job.status] .. job.queue, id)
redis.call('ZREM', RETENTION, id)
redis.call('ZREM', DEADLINES, id)
if job.batch then
  redis.call('ZREM', BATCH_JOBS .. job.batch, id)
  redis.call('ZREM', BATCH_JOBS .. job.batch .. ':' .. job.status, id)
end
for upload in string.gmatch(job.uploads or '', 'upload_%w+') do redis.call('SREM', UPLOAD_JOBS .. upload, id) end
forget_key(job.tenant, job.idempotency, id)
return 1
