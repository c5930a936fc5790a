class QuestionTask: pass
