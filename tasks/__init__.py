"""The stages: one file a stage, the stage table, the artifact store and the registry."""
