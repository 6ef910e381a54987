"""How the service is deployed on a cluster, and what checks that."""
