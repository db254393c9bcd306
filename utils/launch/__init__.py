"""The launcher, and the supervisor that stays beside it; only the standard library is needed."""
