#!/bin/sh
# Print an .env for docker-compose.yml with fresh secrets: (umask 077; deploy/env.sh > .env)
set -eu

random() { openssl rand "$@"; }

cat <<EOF
SAFELIGHT_API_KEY=$(random -hex 24)
SAFELIGHT_WEBHOOK_SECRET=whsec_$(random -base64 32)
S3_ACCESS_KEY=GK$(random -hex 12)
S3_SECRET_KEY=$(random -hex 32)
GARAGE_RPC_SECRET=$(random -hex 32)
GRAFANA_PASSWORD=$(random -hex 12)
# Where callers reach the API and the object store, and which address the ports are published on:
#SAFELIGHT_PUBLIC_URL=https://safelight.example.org
#S3_PUBLIC_URL=https://files.example.org
#BIND=0.0.0.0
# What Redis may take, some 1,500 bytes a waiting job; new jobs are refused from four fifths of it on:
#REDIS_MEMORY=1gb
EOF
