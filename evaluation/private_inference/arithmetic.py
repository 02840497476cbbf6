"""The operations that a private program consists of, as JAX sees them; `fixed_point.py` computes them in the ring."""


class Arithmetic:
    """
    What a protocol charges for or rounds; sums, slices and products with public 0 and 1 are written as they are.

    Args:
        xp: `jax.numpy`, from which the engine's program is traced, or `numpy`.
    """

    def __init__(self, xp):
        self.xp = xp

    def public(self, constant: float):
        """A number to add: where numbers are encoded, so is this."""
        return constant

    def matmul(self, left, right):
        return self.xp.matmul(left, right)

    def multiply(self, left, right):
        return left * right

    def scale(self, tensor, constant: float):
        """The product with a public number."""
        return tensor * constant

    def square(self, tensor):
        return self.xp.square(tensor)

    def exp(self, tensor):
        return self.xp.exp(tensor)

    def reciprocal(self, tensor):
        return 1.0 / tensor

    def divide(self, tensor, divisor):
        return tensor / divisor

    def reciprocal_root(self, tensor):
        return 1.0 / self.xp.sqrt(tensor)

    def tanh(self, tensor):
        return self.xp.tanh(tensor)

    def erf(self, tensor):
        from jax.scipy.special import erf

        return erf(tensor)

    def largest(self, tensor):
        """The largest of each row, as a row of one."""
        return self.xp.max(tensor, axis=-1, keepdims=True)

    def positive_part(self, tensor):
        return self.xp.maximum(tensor, 0.0)

    def at_most(self, tensor, bound: float):
        return self.xp.minimum(tensor, bound)

    def index_of_largest(self, tensor):
        return self.xp.argmax(tensor, axis=-1)
