"""The bidiagonal matrix of LSMR: its rotations, and what x needs of them."""

from typing import NamedTuple

import jax.numpy as jnp

from ..typing import Scalar


class Step(NamedTuple):
    """h̄_k = h_k − `h_bar` h̄_{k−1}, x_k = x_{k−1} + `x` h̄_k, h_{k+1} = v_{k+1} − `h` h_k."""

    h_bar: Scalar  # θ̄_k ρ_k / (ρ_{k−1} ρ̄_{k−1})
    x: Scalar  # ζ_k / (ρ_k ρ̄_k)
    h: Scalar  # θ_{k+1} / ρ_k
    residual: Scalar  # ‖r_k‖


class Bidiagonal(NamedTuple):
    """The scalars that LSMR carries, in the paper's letters: `bar` is ¯, `dot` ˙, `ddot` ¨.

    Source: Fong & Saunders, SIAM J. Sci. Comput. 33(5), 2011, section 2.8 (x) and 3.2 (‖r‖).
    """

    alpha_bar: Scalar
    zeta_bar: Scalar
    zeta: Scalar
    rho: Scalar
    rho_bar: Scalar
    c_bar: Scalar
    s_bar: Scalar
    beta_ddot: Scalar
    beta_dot: Scalar
    rho_dot: Scalar
    tau_tilde: Scalar
    theta_tilde: Scalar

    @staticmethod
    def begun(alpha: Scalar, beta: Scalar) -> "Bidiagonal":
        """At α_1 and β_1."""
        one, nothing = jnp.ones_like(alpha), jnp.zeros_like(alpha)
        return Bidiagonal(
            alpha_bar=alpha,
            zeta_bar=alpha * beta,
            zeta=nothing,
            rho=one,
            rho_bar=one,
            c_bar=one,
            s_bar=nothing,
            beta_ddot=beta,
            beta_dot=nothing,
            rho_dot=one,
            tau_tilde=nothing,
            theta_tilde=nothing,
        )

    @property
    def normal(self) -> Scalar:
        """‖Aᴴr_k‖ = |ζ̄_{k+1}|."""
        return jnp.abs(self.zeta_bar)

    def advanced(self, alpha: Scalar, beta: Scalar) -> tuple["Bidiagonal", Step]:
        """With β_{k+1} and α_{k+1}, a row and a column more."""
        # P_k, the rotation of the bidiagonal matrix.
        rho = jnp.hypot(self.alpha_bar, beta)
        cos, sin = self.alpha_bar * inverse(rho), beta * inverse(rho)
        theta, alpha_bar = sin * alpha, cos * alpha
        # P̄_k, that of the triangular one.
        theta_bar, rho_temp = self.s_bar * rho, self.c_bar * rho
        rho_bar = jnp.hypot(rho_temp, theta)
        c_bar, s_bar = rho_temp * inverse(rho_bar), theta * inverse(rho_bar)
        zeta, zeta_bar = c_bar * self.zeta_bar, -s_bar * self.zeta_bar
        # P̃_{k−1}, for ‖r_k‖.
        beta_hat, beta_ddot = cos * self.beta_ddot, -sin * self.beta_ddot
        rho_tilde = jnp.hypot(self.rho_dot, theta_bar)
        c_tilde, s_tilde = self.rho_dot * inverse(rho_tilde), theta_bar * inverse(rho_tilde)
        theta_tilde, rho_dot = s_tilde * rho_bar, c_tilde * rho_bar
        beta_dot = c_tilde * beta_hat - s_tilde * self.beta_dot
        tau_tilde = (self.zeta - self.theta_tilde * self.tau_tilde) * inverse(rho_tilde)
        tau_dot = (zeta - theta_tilde * tau_tilde) * inverse(rho_dot)
        new = Bidiagonal(
            alpha_bar, zeta_bar, zeta, rho, rho_bar, c_bar, s_bar,
            beta_ddot, beta_dot, rho_dot, tau_tilde, theta_tilde,
        )  # fmt: skip
        step = Step(
            h_bar=theta_bar * rho * inverse(self.rho * self.rho_bar),
            x=zeta * inverse(rho * rho_bar),
            h=theta * inverse(rho),
            residual=jnp.hypot(beta_dot - tau_dot, beta_ddot),
        )
        return new, step


def inverse(x: Scalar) -> Scalar:
    """1/x, and 0 for 0: a process that has ended goes on with zero vectors."""
    return jnp.where(x == 0, jnp.zeros_like(x), 1 / jnp.where(x == 0, jnp.ones_like(x), x))
