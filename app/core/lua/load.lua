-- What waits and runs in a queue, as one tenant sees it; changes nothing. ARGV: queue, tenant, then other queues whose
-- jobs the same workers make. Returns {work that runs, its rows, {what waits in the tenant's lanes: high, normal, low}, {how
-- many jobs there}, its weight, {what waits, weight, ... of other tenants}, {what waits in each other queue}}; work is in
-- milliseconds of the denoiser.
local MOST = 64 -- tenants that are looked at one by one; the others count as equals
local queue, tenant = ARGV[1], ARGV[2]
local key, own = WORK .. queue, tenant == DEFAULT_TENANT and queue or queue .. '@' .. tenant

local function numbers(from, ...)
  local found = redis.call('HMGET', from, ...)
  for i = 1, #found do found[i] = tonumber(found[i] or 0) end
  return found
end

local function lanes_of(share) return numbers(key, share .. ':high', share, share .. ':low') end
local function weight_of(name) return redis.call('HGET', LIMITS .. name, 'weight') or '1' end

local sums, mine = numbers(key, 'running', 'rows', 'waiting'), lanes_of(own)
local left, others, count = sums[3] - mine[1] - mine[2] - mine[3], {}, 0
for _, share in ipairs(redis.call('ZRANGE', SHARES .. queue, 0, MOST)) do
  if share ~= own then
    local lanes = lanes_of(share)
    local work = lanes[1] + lanes[2] + lanes[3]
    if work > 0 then
      others[#others + 1] = work
      others[#others + 1] = weight_of(tenant_of(share))
      left = left - work
    end
  end
end
local more = redis.call('ZCARD', SHARES .. queue) - MOST - 1
if more > 0 and left > 0 then
  others[#others + 1] = left
  others[#others + 1] = tostring(more)
end
local queues, counts = {}, {}
for i, lane in ipairs({own .. ':high', own, own .. ':low'}) do counts[i] = redis.call('ZCARD', WAITING .. lane) end
for i = 3, #ARGV do queues[#queues + 1] = numbers(WORK .. ARGV[i], 'waiting')[1] end
return {sums[1], sums[2], mine, counts, weight_of(tenant), others, queues}
