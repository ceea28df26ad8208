"""Mixture-of-experts layers: routers, dispatch, losses."""
