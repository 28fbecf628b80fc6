"""Replicas of a cluster, seen, added and drained while serving. Changing needs the admin key."""

from __future__ import annotations

import msgspec
from aiohttp import web

from inlaid.server.admin import finish
from inlaid.server.completions import answer
from inlaid.server.protocol.admin import ReplicaCard, ReplicaList
from inlaid.server.service import SERVICE


async def _listed(request: web.Request) -> web.Response:
    states = await request.app[SERVICE].engine.replicas()
    return answer(ReplicaList(replicas=[msgspec.convert(s, ReplicaCard, from_attributes=True) for s in states]))


async def list_replicas(request: web.Request) -> web.Response:
    """List the replicas with their states and figures; none where the server is one engine."""
    return await _listed(request)


async def add_replica(request: web.Request) -> web.Response:
    """Start one more replica, and answer with all when it serves."""
    await finish(request, request.app[SERVICE].engine.add_replica())
    return await _listed(request)


async def drain_replica(request: web.Request) -> web.Response:
    """Let a replica's requests end, remove it, and answer with those that are left."""
    await finish(request, request.app[SERVICE].engine.drain_replica(request.match_info["name"]))
    return await _listed(request)
