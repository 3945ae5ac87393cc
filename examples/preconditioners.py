# %% [markdown]
# # One problem, many linear solvers
#
# Steady reaction and diffusion of two species on a square, u and v at every node: the Brusselator.
# Its Jacobian is nonsymmetric and couples the species. The table shows what each way of solving the
# linear systems of Newton's method needs; all of them share one linearisation a step.

# %%
import os

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import nksolve as nks
from nksolve.problems import get

SMALL = os.environ.get("NKSOLVE_EXAMPLES_SMALL") == "1"
problem = get("brusselator", n=8 if SMALL else 32)


def largest(f):
    return jnp.max(jnp.abs(f))


# %% [markdown]
# `BlockJacobi` inverts the 2 × 2 block of each node, found by four matvecs; `SparseDirect` and
# `AlgebraicMultigrid` find the pattern of J by themselves; `AutoLinear` looks and chooses.
# `GCRODR` keeps the space that slows the others down from one Newton step to the next.

# %%
blocks = nks.BlockJacobi(coupling=nks.Star(periodic=True))
algebraic = nks.AlgebraicMultigrid.from_jacobian(problem.fn, problem.y0, problem.args, components=2)
linear_solvers = {
    "GMRES(60)": nks.GMRES(restart=60),
    "GCRODR(40, 10)": nks.GCRODR(restart=40, recycle=10),
    "GMRES(60), BlockJacobi": nks.GMRES(restart=60, preconditioner=blocks),
    "BiCGStab, AlgebraicMultigrid": nks.BiCGStab(preconditioner=algebraic),
    "GMRES, AlgebraicMultigrid": nks.GMRES(preconditioner=algebraic),
    "AutoLinear": nks.AutoLinear(),
}

# %%
print(f"{problem.title}, to a largest residual of 1e-4\n")
print(f"{'linear solver':30s}{'steps':>7s}{'matvecs':>9s}{'probes':>8s}  chosen")
for name, linear_solver in linear_solvers.items():
    solver = nks.NewtonKrylov(rtol=0.0, atol=1e-4, norm=largest, linear_solver=linear_solver)
    solution = nks.root_find(problem.fn, solver, problem.y0, problem.args)
    stats = solution.stats
    assert largest(problem.fn(solution.value, problem.args)) <= 1e-4
    counts = (
        f"{int(stats['num_steps']):7d}{int(stats['num_matvecs']):9d}{int(stats['num_probes']):8d}"
    )
    print(f"{name:30s}{counts}  {stats.get('choice', '')}")

# %% [markdown]
# The preconditioner goes with the method into `lx.linear_solve` and into gradients, transposed: the
# derivative of the mean of v with respect to A, by the adjoint and by differences.


# %%
@jax.jit
def mean(a):
    krylov = nks.GMRES(restart=60, preconditioner=blocks)
    solver = nks.NewtonKrylov(rtol=0.0, atol=1e-11, norm=largest, linear_solver=krylov)
    args = problem.args._replace(a=a)
    adjoint = nks.KrylovAdjoint(rtol=1e-9)
    return nks.root_find(problem.fn, solver, problem.y0, args, adjoint=adjoint).value[..., 1].mean()


a, h = problem.args.a, 1e-4
adjoint, difference = jax.grad(mean)(a), (mean(a + h) - mean(a - h)) / (2 * h)
print(f"\nd mean(v) / dA   by the adjoint {adjoint:.8f}   by differences {difference:.8f}")
assert abs(adjoint - difference) < 1e-5 * abs(difference)
