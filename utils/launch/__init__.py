"""Around the workers: the supervisor and what it needs. The standard library only.

launcher.sh builds the commands that it starts: dist_command and horovod_command.
"""
