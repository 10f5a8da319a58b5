-- What a tenant may hand in. `rules` are the service's own, which a tenant's own replace name by name; 0: no limit.
local function limits_of(tenant, rules)
  local own = hash(LIMITS .. tenant)
  return function(name) return tonumber(own[name] or rules[name] or 0) end
end

-- A bucket fills at `rate` denoiser-milliseconds a second up to `burst`. Who finds in it what he needs, or finds it
-- full, may go; a job larger than the bucket leaves a debt. Returns what is in it, and how long to wait (ms), or 0.
local function look_into_bucket(tenant, rate, burst, cost, at)
  local held = redis.call('HMGET', BUCKET .. tenant, 'tokens', 'at')
  local tokens = tonumber(held[1] or burst) + rate * math.max(at - tonumber(held[2] or at), 0) / 1000
  tokens = math.min(tokens, burst)
  local short = math.min(cost, burst) - tokens
  return tokens, short > 0 and math.ceil(1000 * short / rate) or 0
end

-- Whether a tenant may hand in `count` jobs of `cost` denoiser-milliseconds; if so, the bucket is charged.
-- Returns why not ('rate', 'waiting', 'overloaded') or '', then milliseconds until it is worth trying again, then the
-- bucket: its size, what is in it, and milliseconds until it is full.
local function admit(tenant, count, cost, rules)
  local limit, at = limits_of(tenant, rules), now()
  local rate, burst, most = 1000 * limit('rate'), 1000 * limit('burst'), limit('max_waiting')
  local reason, wait, tokens = '', 0, 0
  if rate > 0 then
    if burst == 0 then burst = 60 * rate end
    tokens, wait = look_into_bucket(tenant, rate, burst, cost, at)
    if wait > 0 then reason = 'rate' end
  end
  if most > 0 and redis.call('ZCARD', JOBS .. tenant .. ':queued') + count > most then
    -- The first of those that wait goes in about that part of the time that a new one would wait.
    local queued = redis.call('ZCARD', JOBS .. tenant .. ':queued')
    reason, wait = 'waiting', math.max(wait, math.ceil(tonumber(rules.start_ms or 0) / math.max(queued, 1)))
  end
  if tonumber(rules.over_ms or 0) > 0 then reason, wait = 'overloaded', math.max(wait, tonumber(rules.over_ms)) end
  if rate > 0 then
    if reason == '' then
      tokens = tokens - cost
      redis.call('HSET', BUCKET .. tenant, 'tokens', string.format('%.0f', tokens), 'at', at)
      redis.call('PEXPIRE', BUCKET .. tenant, math.min(math.ceil(1000 * (burst - tokens) / rate) + 60000, 1e12))
    end
    return reason, wait, burst, tokens, 1000 * (burst - tokens) / rate
  end
  return reason, wait, 0, 0, 0
end
