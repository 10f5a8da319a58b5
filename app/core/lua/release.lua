-- Hand a job back unfinished, without using up a try. ARGV: id, fence, patience (ms) or ''.
-- With a patience the worker could not read it, and it goes to the end of its lane for one of another version; after that
-- long nobody can. Returns 'done', 'lost' or 'unreadable' (and the job is still the worker's).
local id, fence, patience = ARGV[1], ARGV[2], tonumber(ARGV[3])
local held = redis.call('HMGET', JOB .. id, 'status', 'fence', 'queue', 'alone')
if held[1] ~= 'processing' or held[2] ~= fence then return 'lost' end
local at = now()
if patience then
  redis.call('HSETNX', JOB .. id, 'unread_since', at)
  if at - tonumber(redis.call('HGET', JOB .. id, 'unread_since')) > patience then return 'unreadable' end
end
redis.call('HINCRBY', JOB .. id, 'tries', -1)
requeue(id, held[3], at, held[4] == '1', patience)
return 'done'
