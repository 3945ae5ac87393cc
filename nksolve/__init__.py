"""Newton–Krylov solvers for JAX: linearise once, share everything."""
