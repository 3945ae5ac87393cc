/* The steady 2-D Brusselator of nksolve.problems.brusselator by PETSc's SNES, for
   `python -m benchmarks --pde`. All of PETSc's options apply; besides them

     -n 64          nodes a side
     -max_norm 1e-4 stop at ||F||_inf <= this
     -repeats 3     solves from the start, one after another with the same SNES

   prints one line: seconds of the first and of the fastest solve, Newton steps, linear
   iterations, ||F||_inf and the sum of u at the end, and SNES's reason. */

#include <petscdmda.h>
#include <petscsnes.h>
#include <petsctime.h>

typedef struct {
  PetscReal a, b, alpha, source, max_norm;
  PetscInt  n;
} Problem;

typedef struct {
  PetscScalar u, v;
} Field;

static PetscReal Source(const Problem *p, PetscInt i, PetscInt j)
{
  PetscReal x = i / (p->n - 1.0) - 0.3, y = j / (p->n - 1.0) - 0.6;
  return x * x + y * y <= 0.01 ? p->source : 0.0;
}

static PetscErrorCode Residual(DMDALocalInfo *info, Field **y, Field **f, void *context)
{
  Problem  *p = (Problem *)context;
  PetscReal d = p->alpha * (p->n - 1.0) * (p->n - 1.0);

  PetscFunctionBeginUser;
  for (PetscInt j = info->ys; j < info->ys + info->ym; j++) {
    for (PetscInt i = info->xs; i < info->xs + info->xm; i++) {
      PetscScalar u = y[j][i].u, v = y[j][i].v;
      PetscScalar lu = y[j][i - 1].u + y[j][i + 1].u + y[j - 1][i].u + y[j + 1][i].u - 4.0 * u;
      PetscScalar lv = y[j][i - 1].v + y[j][i + 1].v + y[j - 1][i].v + y[j + 1][i].v - 4.0 * v;
      f[j][i].u = d * lu + p->b + u * u * v - (p->a + 1.0) * u + Source(p, i, j);
      f[j][i].v = d * lv + p->a * u - u * u * v;
    }
  }
  PetscFunctionReturn(0);
}

static PetscErrorCode Jacobian(DMDALocalInfo *info, Field **y, Mat A, Mat P, void *context)
{
  Problem  *p = (Problem *)context;
  PetscReal d = p->alpha * (p->n - 1.0) * (p->n - 1.0);

  PetscFunctionBeginUser;
  for (PetscInt j = info->ys; j < info->ys + info->ym; j++) {
    for (PetscInt i = info->xs; i < info->xs + info->xm; i++) {
      PetscScalar u = y[j][i].u, v = y[j][i].v;
      MatStencil  row[1] = {{0, j, i, 0}};
      MatStencil  column[5] = {{0, j, i, 0}, {0, j, i - 1, 0}, {0, j, i + 1, 0}, {0, j - 1, i, 0}, {0, j + 1, i, 0}};
      PetscScalar values[2][10] = {{0}};
      values[0][0] = -4.0 * d + 2.0 * u * v - (p->a + 1.0);
      values[0][1] = u * u;
      values[1][0] = p->a - 2.0 * u * v;
      values[1][1] = -4.0 * d - u * u;
      for (PetscInt k = 1; k < 5; k++) values[0][2 * k] = values[1][2 * k + 1] = d;
      PetscCall(MatSetValuesBlockedStencil(P, 1, row, 5, column, &values[0][0], INSERT_VALUES));
    }
  }
  PetscCall(MatAssemblyBegin(P, MAT_FINAL_ASSEMBLY));
  PetscCall(MatAssemblyEnd(P, MAT_FINAL_ASSEMBLY));
  if (A != P) {
    PetscCall(MatAssemblyBegin(A, MAT_FINAL_ASSEMBLY));
    PetscCall(MatAssemblyEnd(A, MAT_FINAL_ASSEMBLY));
  }
  PetscFunctionReturn(0);
}

static PetscErrorCode Start(DM da, const Problem *p, Vec x)
{
  Field       **y;
  DMDALocalInfo info;

  PetscFunctionBeginUser;
  PetscCall(DMDAGetLocalInfo(da, &info));
  PetscCall(DMDAVecGetArray(da, x, &y));
  for (PetscInt j = info.ys; j < info.ys + info.ym; j++) {
    for (PetscInt i = info.xs; i < info.xs + info.xm; i++) {
      PetscReal s = i / (p->n - 1.0), t = j / (p->n - 1.0);
      y[j][i].u = 22.0 * PetscPowReal(t * (1.0 - t), 1.5);
      y[j][i].v = 27.0 * PetscPowReal(s * (1.0 - s), 1.5);
    }
  }
  PetscCall(DMDAVecRestoreArray(da, x, &y));
  PetscFunctionReturn(0);
}

static PetscErrorCode MaxNorm(SNES snes, PetscInt it, PetscReal xnorm, PetscReal snorm, PetscReal fnorm, SNESConvergedReason *reason, void *context)
{
  Vec       f;
  PetscReal norm;

  PetscFunctionBeginUser;
  PetscCall(SNESGetFunction(snes, &f, NULL, NULL));
  PetscCall(VecNorm(f, NORM_INFINITY, &norm));
  *reason = SNES_CONVERGED_ITERATING;
  if (PetscIsInfOrNanReal(norm)) *reason = SNES_DIVERGED_FNORM_NAN;
  else if (norm <= ((Problem *)context)->max_norm) *reason = SNES_CONVERGED_FNORM_ABS;
  PetscFunctionReturn(0);
}

int main(int argc, char **argv)
{
  Problem             p = {3.4, 1.0, 10.0, 5.0, 1e-4, 32};
  PetscInt            repeats = 1, newton = 0, linear = 0;
  DM                  da;
  SNES                snes;
  Vec                 x, f;
  PetscLogDouble      begin, end, first = 0.0, best = 0.0;
  PetscReal           norm;
  PetscScalar         total;
  SNESConvergedReason reason;

  PetscCall(PetscInitialize(&argc, &argv, NULL, NULL));
  PetscCall(PetscOptionsGetInt(NULL, NULL, "-n", &p.n, NULL));
  PetscCall(PetscOptionsGetReal(NULL, NULL, "-max_norm", &p.max_norm, NULL));
  PetscCall(PetscOptionsGetInt(NULL, NULL, "-repeats", &repeats, NULL));
  PetscCall(DMDACreate2d(PETSC_COMM_WORLD, DM_BOUNDARY_PERIODIC, DM_BOUNDARY_PERIODIC, DMDA_STENCIL_STAR, p.n, p.n, PETSC_DECIDE, PETSC_DECIDE, 2, 1, NULL, NULL, &da));
  PetscCall(DMSetFromOptions(da));
  PetscCall(DMSetUp(da));
  PetscCall(SNESCreate(PETSC_COMM_WORLD, &snes));
  PetscCall(SNESSetDM(snes, da));
  PetscCall(DMDASNESSetFunctionLocal(da, INSERT_VALUES, (DMDASNESFunction)Residual, &p));
  PetscCall(DMDASNESSetJacobianLocal(da, (DMDASNESJacobian)Jacobian, &p));
  PetscCall(SNESSetFromOptions(snes));
  PetscCall(SNESSetConvergenceTest(snes, MaxNorm, &p, NULL));
  PetscCall(DMCreateGlobalVector(da, &x));
  for (PetscInt k = 0; k < repeats; k++) {
    PetscCall(Start(da, &p, x));
    PetscCall(PetscTime(&begin));
    PetscCall(SNESSolve(snes, NULL, x));
    PetscCall(PetscTime(&end));
    end -= begin;
    if (k == 0) first = best = end;
    best = PetscMin(best, end);
  }
  PetscCall(SNESGetIterationNumber(snes, &newton));
  PetscCall(SNESGetLinearSolveIterations(snes, &linear));
  PetscCall(SNESGetConvergedReason(snes, &reason));
  PetscCall(VecDuplicate(x, &f));
  PetscCall(SNESComputeFunction(snes, x, f));
  PetscCall(VecNorm(f, NORM_INFINITY, &norm));
  PetscCall(VecStrideSum(x, 0, &total));
  PetscCall(PetscPrintf(PETSC_COMM_WORLD, "result first=%g best=%g newton=%" PetscInt_FMT " linear=%" PetscInt_FMT " max_norm=%g sum=%.12g reason=%s\n", first, best, newton, linear, (double)norm, (double)total, SNESConvergedReasons[reason]));
  PetscCall(VecDestroy(&f));
  PetscCall(VecDestroy(&x));
  PetscCall(SNESDestroy(&snes));
  PetscCall(DMDestroy(&da));
  PetscCall(PetscFinalize());
  return 0;
}
