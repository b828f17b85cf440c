"""Attention for Hopper GPUs (sm_90), in Gluon: products by warpgroups, tiles by the copy engine, warps with roles."""
