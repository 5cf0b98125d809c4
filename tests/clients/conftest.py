# They import projects that only their own environments have.
collect_ignore_glob = ["client_*.py", "run_client.py"]
