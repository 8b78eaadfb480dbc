"""The client half: one ClientApp that carries out any plan."""
