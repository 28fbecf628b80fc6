"""Many replicas behind one endpoint: placement, planning, failover."""
