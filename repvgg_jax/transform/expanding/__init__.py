"""`expand`: a traced function whose convolutions train as parallel branches, and become one kernel again."""
