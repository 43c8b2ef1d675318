"""The command that tokenises a source into a folder of shards, by several processes.

``config`` has the settings of this command, ``folder`` does its work.
"""
