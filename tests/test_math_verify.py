r"""`math_verify` on pairs of answers of which it is known whether they are equal.

The facts are those of the test tables of Math-Verify, of hendrycks' MATH, of lighteval and of the
rules of PRM800K's grader, in this file's own form, and pairs that were once judged wrongly here.
Each line is a ground truth and then answers, separated by two or more spaces.
"""

import re
import time

import pytest
from test_reward import NASTY

from evaluate import prompt_metrics
from infra.math_verify import answer_or_box, numbers_of, plain_notation, score_math_verify

RIGHT = r"""
-5  -5  -5.0  -5.
7425000  7,425,000  7{,}425{,}000  7,\!425,\!000
1000  1 000  1000.0  1,000.0  1,000
1000.99  1,000.99  \$1,000.99
0.4  .4  0.40  2/5  \frac25  40\%
0.1  .1
2.74  2.74
10  \$10  10\text{ units}  10 units  x=10  10.  10.0  +10
10\text{ units}  10
300000000  3\times 10^8  3 \cdot 10^{8}  3\times10^{8}  300,000,000  3e8
0.0025  2.5\times 10^{-3}  2.5 \times 10^{-3}  1/400
3\times 10^8  300000000  3\cdot 10^8
6.02\times 10^{23}  6.02\cdot 10^{23}
10/9  \frac{10}{9}  \dfrac{10}{9}  \frac{20}{18}
-10/9  -\frac{10}{9}  \frac{-10}{9}  \frac{10}{-9}
8/46  \frac{4}{23}
1/3  \frac13  \cfrac{1}{3}  \dfrac{1}{3}  \tfrac{1}{3}  \left( \frac{1}{3} \right)  k = \frac{1}{3}
1/3  \frac{1}{3} \text{meters}  \frac{1}{3} \textbf{meters}  \boxed{\frac{1}{3}}
\frac{1}{2}  1/2  0.5  .5  \frac12  \dfrac12  50\%
\frac83  \tfrac83  \frac{8}{3}  8/3  2\frac{2}{3}
7\frac{3}{4}  \frac{31}{4}  7.75  7 3/4
1  \frac3{3}
\sqrt{3}  \sqrt3  \sqrt 3  3^{1/2}
12  12\,\text{cm}  12\;\text{cm}  12~\text{cm}  12\quad\text{cm}
(1,\,2)  (1,\;2)  (1,~2)  (1,2)
9  9  x = 9  3+6 = 9  m+n=9  9\text{ apples}  \text{9}  {9}  9 apples  $9$ apples  it is $9$
\frac{3}{4}  \frac{3}{4} cup  \frac{3}{4}\text{ cup}  \frac34 \approx 0.75  0.75 cups
28\%  28\%  28%  28 percent  28  0.28  28 \%
90^\circ  90^{\circ}  90  90 degrees  90^\circ.
125  125\textnormal{ miles}  125\text{ miles}  125 miles
0.06\text{ yuan}  0.06\text{ yuan}  0.06
11111111100  11,\!111,\!111,\!100  11,111,111,100
32349  32,\!349  32{,}349
18  18 dollars  18 dollars.  \$18  18\text{ cm}^2  18\text{ cm}
2-2p  2-2p  2(1-p)  -2p+2
1 \pm \sqrt{19}  1 \pm \sqrt{19}  1\pm\sqrt{19}
3 \pm 2 \sqrt{2}  3 \pm 2 \sqrt{2}  3\pm\sqrt{8}
\pm 2021  \{-2021, 2021\}  \pm 2021
\{1\pm\sqrt{5},-2\}  \{1\pm\sqrt{5},-2\}
2 \sin b \cos a  2 \sin b \cos a  2\cos a\sin b
\sqrt{2}+\sqrt{5}  \sqrt 2+\sqrt 5  \sqrt5+\sqrt2
\frac{9}{4}\pi  \frac94\pi  \frac{9\pi}{4}  2.25\pi
5\pi  \pi \cdot 5  5\pi
\frac{14}{3}  \frac{14}{3}  4\frac{2}{3}
\frac{x+2}{7}  \frac{x}{7}+\frac{2}{7}  (x+2)/7
\tan^2(y)+1  \sec^2(y)
x^2-1  (x+1)(x-1)  -1+x^2
\left(x-2\right)\left(x+2\right)  (x-2)(x+2)  x^2-4
\frac34i  \frac{3}{4}i  \frac{3i}{4}
4 - i  4-i  -i+4
10\sqrt{3} + \sqrt4  10\sqrt3 + \sqrt{4}
\tfrac{1}{2} +\! \frac1{72}  \dfrac{1}{2} +\frac{1}{72}  \frac{37}{72}
\frac{\sqrt{\sqrt{11}+\sqrt{194}}}{15+2\sqrt{33}}  \frac{\sqrt{\sqrt{11}+\sqrt{194}}}{2\sqrt{33}+15}
\frac{\sqrt{2}}{2}  \frac{1}{\sqrt 2}  \frac{1}{\sqrt{2}}  \sqrt{1/2}
2\sqrt{2}  \sqrt{8}  2\sqrt 2
1 - \frac{1}{e}  1 - \frac{1}{e}  \frac{e-1}{e}  1-e^{-1}
2^{100}  2^{100}  4^{50}
[0,1)  [0,1)  \left[0,1\right)  [0, 1)
[-4,0]  [-4, 0]  \left[-4,0\right]
(3, \frac{\pi}{2})  \left( 3, \frac{\pi}{2} \right)  (3,\pi/2)
(1,\frac{9}{2})  (1,4.5)  \left(1,\frac92\right)  (1, 9/2)
(2, 12) \cup (12, 102)  (2,12) \cup (12,102)  x \in (2,12) \cup (12,102)
(1, +\infty)  (1, \infty)  (1, +\infty)
[-1, -\frac{1}{2}) \cup (-\frac{1}{2}, 0)  [-1, -\tfrac12) \cup (-\tfrac12, 0)
\{-1\} \cup [0,7)  \{-1\} \cup [0,7)
-793 < a < 10  (-793, 10)  -793<a<10
-2 \le x \le 7  x \in [-2,7]  -2\leq x\leq 7  [-2,7]
0<f(x)<1  (0,1)
x \geq 5  x \ge 5  5 \leq x  x >= 5
x < 3  x \lt 3  3 > x  -x > -3
x \leq 2  x <= 2  2\ge x  -x \geq -2
x \neq 3  x \ne 3
k \ge 2  k \ge 2  k \geq 2
x = 11  x = 5+5+1 = 11  11  x=11
11  x=11  x\approx 11
k=1  1  k = 1
2x+4y-3=0  y=-\frac{1}{2}x+\frac{3}{4}  2x + 4y = 3
x^2/4 + y^2/3 = 1  x^2/16 + y^2/12 = 1/4  3x^2+4y^2=12
34x+45y-20z+100=0  -34x-45y+20z-100=0  20z=34x+45y+100
11x + 6y + 5z + 86 = 0  11x + 6y + 5z + 86 = 0  11x+6y+5z=-86  -11x-6y-5z-86=0
f(y) = y  f(y) = y
f(x)=1  1
y = 2x + 3  y=2x+3  y = 3+2x  2x+3
\begin{pmatrix}1&0\\0&1\end{pmatrix}  \begin{pmatrix}1&0\\0&1\end{pmatrix}  \begin{bmatrix}1&0\\0&1\end{bmatrix}
\begin{pmatrix}\frac{1}{2}\\3\end{pmatrix}  \begin{pmatrix}1/2\\3\end{pmatrix}  \begin{pmatrix}0.5\\3\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix}  \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
\{1,2,3\}  \{3,2,1\}  \{1, 2, 3\}
(37,3,13),(17,3,7)  (37, 3, 13), (17, 3, 7)  (17,3,7),(37,3,13)
(2,2), (6,2)  (2, 2) \text{ and } (6, 2)  (2,2),(6,2)
(p,q)=(3,2)  (3,2)  (p, q) = (3, 2)
(5, 8), (8, 5)  (5,8),(8,5)
\frac{NO}{BO}=\frac{1}{\sqrt{6}}  \frac{1}{\sqrt{6}}
|AB|=1  1
7:32  7:32  7 : 32
12:00  12:00
1,2  1,2  1, 2  1 \text{ and } 2  1 and 2  $1$ and $2$
1, 2, 3  1,2,3  $1, 2, 3$  1, 2, \text{ and } 3  1,2 and 3
19, 46, and 82  19, 46, \text{ and } 82  19,46,82
21,16,11  21,16 or 11
6 \text{ and } 8  6,8  6 and 8  6 \text{ and } 8
10, 4, -2  10, 4, -2  10,4,-2
0.1, 4, 2  .1, 4, 2  \frac{1}{10}, 4, 2
n=1, 2, 3  n=1, 2, 3  n = 1,2,3
x=4, y=3  x=4,y=3  x = 4, y = 3  y=3, x=4  x=4 \text{ and } y=3
AB=4,CD=5  4, 5
x=-1,x=2  x=2,x=-1  x = -1, x = 2
a_3 = 2, a_{37} = 19  a_3=2, a_{37}=19
x=-5, p=\frac{14}{3}  -5, \frac{14}{3}
1, \frac12  1, 0.5  1, \frac{1}{2}
\sqrt2, -\sqrt2  \sqrt{2}, -\sqrt{2}
3x=6  3x = 6
17_8  17_8  17_{8}  17_{\text{8}}
1011_2  1011_2  1011_{2}
x,y  x,y  x, y
(A)  A  (A)  \text{(A)}  \text{A}
\text{(C)}  \text{C}  C  (C)
\text{E}  E
C  C  \textbf{C}  \textbf{(C)}
yes  yes  Yes  \text{yes}  "yes"  \text{Yes}.  \textbf{yes}
\text{Evelyn}  Evelyn  \text{Evelyn}
\text{odd}  odd  \text{odd}  \text{Odd}
\text{even}  Even
\text{The midpoints form a hexagon}  The midpoints form a hexagon
\text{Monday}  Monday  monday
\text{no solution}  no solution  \text{no solution}
\infty  \infty
5 million  5 million
no  no  No  \text{no}
3+4i  4i+3  3 + 4i
\log_2 3  \log_{2} 3
12\pi  12\pi\text{ cm}^2  12\pi cm
0.5x  \frac12 x  x/2
2n+1  2n+1  1+2n
n!  n!
\binom{10}{3}  \binom{10}{3}
10!  10!
x  x
1.5  \frac{3}{2}  3/2  1\frac12
-0.75  -\frac{3}{4}  -3/4  -.75
\frac{a}{b}  a/b  \frac ab
100  100  10^2 = 100
5  \sqrt{25} = 5  5 \text{ cm}  x = 5
"""

WRONG = r"""
11x + 6y + 5z + 86 = 0  0  x=0  11x+6y+5z+85=0  11x+6y+5z
5x - 7y + 11z + 4 = 0  x + y - z + 2 = 0  0
a +3z = 0  0
2x + z = 1  1
a^2 + b = 0  0
7 = 11a+c  11a+c
y = 2x + 3  y = 2x + 4  3
f(x) = x^2  2
x=4, y=3  x=5, y=3  y=4, x=3  3, 4  x=4  x=4,y=3,z=2  3  4  x=3,y=3
3x=6  2x=6  6
1,2  12  2,1  1,2,2  1,1,2  1  2  1.2  1,3  2, 1
1, 2, 3  123  3,2,1  1,2  1,2,3,4  1,2,4  1,1,2,3
10, 4, -2  4, 10, -2  10, 4, 2
10, 4, 2  4, 12, 2
0.1, 4, 2  4, .1, 2
12,13  1213  13,12
1,2  \{1,3\}  $1$, $3$
2,74  274
x,y  y,x
1.5,2  2,1.5
5  $5$ or $6$  5,6  5 or 6  5 and 6  $6$ or $5$  \{5,6\}  5, 5  6
5  5 million  $5$ million  half of $5$  minus $5$  -$5$  [5,5]  5xy
5  2+3  10/2+0  \sqrt{25}  2\cdot 2.5  5x  5!  5^2  2+3=6  x=6
17  > 17  \geq 17  \ge 17  < 17  x > 17  x \ge 17  \neq 17  \leq 17  17_8  17_{8}  17_{10}  71  16
2\sqrt{3}  > 2\sqrt{3}  \geq 2\sqrt{3}  x<2\sqrt{3}
\pi  >\pi  \neq \pi  x \le \pi
17_8  17  17_9  15  71_8
8  10_8
3+4i  3-4i  3+4j
\ln 2  \log 2
\log_2 3  \log_3 2
y=x+1  y=x  y=x-1
4 - i  4  4+i  i  -i  4-2i
4  4 - i  4 + i  4i  4\sqrt{2}  \frac{34}{16}+\frac{\sqrt{1358}}{16}
1/3  0.333333  0.3333  0.33  0.3333333  33\%  3  0.333
1  0.9999999  1.0000001  1.0000000001  0.99999999999
0  0.0000001  10^{-7}  0.00000000001  0x
3.14159265  \pi  3.14159266
\pi  3.141593  3.14159265  3.14  \frac{22}{7}
\sqrt{2}  1.414214  1.41421356  1.41
100000000  100000000.0000001
0.28  28
28/100  28
\frac{28}{100}  28
28  28/100  0.28
28\%  29\%  2.8  0.0028
3628800  10!  10 \cdot 9!
338350  \sum_{k=1}^{100} k^2
1024  2^{10}  2^{5}\cdot 32
6  2\cdot 3  2 \times 3  3!  \sqrt{36}  12/3+2  \gcd(12,18)  60:10  6:1
1/3  \int_0^1 x^2 dx
0.2  1:5
6:30  12:60  0.2
12:00  1:00  12
300000000  3\times 10^7  3\times 10^9  30000000  2\times 10^8  2\times 10^8+10^8
1000000  10^3\times 10^3
[0,9)  [0,1)  (0,9)  [0,9]
(0,9)  [0,9)
1  -[0,1)
(1,5)  (1,2+3)  (1,\sqrt{25})
(1,2),(3,4)  (1,2)  (1,2),(3,4),(5,6)  (2,1),(4,3)  (1,2,3,4)
(1,2)  (2,1)  12  [1,2]  \{2,1\}
(3,1)  (1,3)  \{1,3\}
(1,\frac{9}{2})  (1,4)  (\frac92,1)
\{1,2,3\}  \{1,2\}  \{1,2,4\}  123
(37,3,3),(17,3,3,7)  (37,3,3,13),(17,3,3,7)
x > 5  x < 5  5  x \ge 5
x \geq 5  x \leq 5  x > 5  5
x < 1  x > -1  1
x \in [-2,7]  -3 \le x \le 7
n=2, 3, 4  n=1, 2, 3
D = (0, 1)  D = (0, 1.5)
19, 46, and 82  21, 36, and 82  19,46
\pm 2021  2021  -2021
1 - \frac{1}{e}  1 + \frac{1}{e}
\frac{1+\sqrt{5}}{2}  2  \frac{1-\sqrt5}{2}
1\sqrt{19}  1
x+2n+1  x+1
(a+5)(b+2)  (+5)(b+2)
\begin{pmatrix}1&2\\3&4\end{pmatrix}  \begin{pmatrix}1&2\\3&5\end{pmatrix}  \begin{pmatrix}1&3\\2&4\end{pmatrix}
\tfrac{1}{2} + \frac1{72}  \frac{1}{2} + 2/3
10\text{ units}  100
32349  32, 349
d  \text{E}
f(x)  f(y)
x  y
(A)  (B)  B  AB
\text{(C)}  (D)
no  on  yes
\text{up}  pu  down
5 million  5  5 thousand
1000000  1 thousand
yes  no  sey  yess  y  eys
\text{even}  odd  neve
\text{Evelyn}  Briana
x = 11  y = 11  x=12
3  x=2, y=4  x=3,y=4  3x  3\pi
12  1,2  1 2  1 or 2
6  6 or 7  6x  66  -6  6!  6^2
20  20\pi  x^{20}
-6  6  |{-6}|
0.5  0.05  5
2\sqrt{2}  2.828427  3  \sqrt{2}
2x  2  x  x2x
2^{100}  2^{101}  100
5\text{ km}  6\text{ km}
\frac{9}{4}\pi  \frac{9}{4}  7.068583
(2, 12) \cup (12, 102)  (2,102)  (2,12)
"""

# Where the tables contradict each other or mathematics: what is right here, and what is wrong.
CONTESTED_RIGHT = r"""
20  20\%
5\text{ km}  5\text{ cm}  5
(1,2)  1,2
\{1,2\}  2,1  1,2
1,2  \{2,1\}  \{1,2\}
6  2x=6
10^8  100000000
1  \frac{2}{2}
"""
CONTESTED_WRONG = r"""
\text{e}  E
AB  BA
\frac{1}{12}  0.0833333333333333  0.083333
1, -2  -2, 1
2.74  2,74
1.22  1,22
3x=6  x=2
\sqrt{2}  1.4142135623
x \in [-2,7]  -2 \le x \le 7
5  5 or 5.0
100000000  10^8
"""


def pairs(table):
    """(ground truth, answer) of each answer in a table."""
    rows = [re.split(r"\s{2,}", line) for line in table.strip().splitlines()]
    return [(truth, answer) for truth, *answers in rows for answer in answers]


def ways(answer):
    """Responses that give this answer."""
    if re.search(r"(?<!\\)\$", answer):
        return [f"Answer: {answer}"]
    formula, box = f"${answer}$", f"\\boxed{{{answer}}}"
    return [
        f"Answer: {answer}",
        f"so it is.\nAnswer: {formula}",
        f"so it is.\n**Final Answer:** {formula}.",
        f"**Final Answer:**\n\n\\[{box}\\]",
        f"Answer: we add.\nSo it is ${box}$.",
    ]


def judged(table, all_ways=False):
    """{(ground truth, response): score}; each answer is given in one way, or in all."""
    return {
        (truth, way): score_math_verify(way, truth)
        for number, (truth, answer) in enumerate(pairs(table))
        for way in (ways(answer) if all_ways else [ways(answer)[number % len(ways(answer))]])
    }


# ---- the tables ----


@pytest.mark.parametrize("all_ways", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_right_answers_are_right_and_have_one_pred(all_ways):
    scores = judged(RIGHT + CONTESTED_RIGHT, all_ways)
    assert len(scores) > 300
    assert [pair for pair, score in scores.items() if score.acc != 1 or score.score != 1] == []
    preds = {(truth, score.pred) for (truth, _), score in scores.items()}
    assert len(preds) == len({truth for truth, _ in preds})


@pytest.mark.parametrize("all_ways", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_wrong_answers_are_wrong_and_have_not_the_pred_of_right_ones(all_ways):
    scores = judged(WRONG + CONTESTED_WRONG, all_ways)
    assert len(scores) > 230
    assert [pair for pair, score in scores.items() if score.acc != 0 or score.score != -1] == []
    for (truth, _), score in scores.items():
        assert score.pred != score_math_verify(f"Answer: {truth}", truth).pred


# ---- which answer, and what it is called ----


@pytest.mark.parametrize("response, answer", [
    ("**Final Answer:** \\boxed{73}", "73"),
    ("**Final Answer:**\n\n\\boxed{73}", "73"),
    ("**Final Answer:**\n\\[\n\\boxed{73}\n\\]", "73"),
    ("Final Answer: **73**", "73"),
    ("**Answer:** 73", "73"),
    ("**Answer: 73**", "73"),
    ("**Answer**: 73", "73"),
    ("Answer: 72\nno, \\boxed{73}", "73"),
    ("\\boxed{72}\nAnswer: 73", "73"),
    ("Answer: 72\nAnswer: 73", "73"),
    ("\\boxed{72} \\boxed{73}", "73"),
    ("Answer: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("Answer: 73\n\\boxed{", "73"),
    ("Answer:", ""),
    ("73", ""),
    ("Answer: 73" + "." * 300, ""),
])
def test_the_answer_is_the_last_line_or_a_later_box(response, answer):
    assert answer_or_box(response) == answer


def test_equal_numbers_are_one_answer_of_the_majority():
    """Right ones or wrong ones, however they are written."""
    half = ["0.5", "\\frac{1}{2}", "1/2", "x = \\frac12", "$\\frac{2}{4}$ cm", "50\\%"]
    for truth, majority in (("\\frac{1}{2}", 1), ("3", 0)):
        scores = [score_math_verify(f"Answer: {answer}", truth) for answer in half]
        assert len({score.pred for score in scores}) == 1
        scores = [score_math_verify(f"Answer: {answer}", truth) for answer in "33737"] + scores
        assert prompt_metrics(scores, True, True)["maj@11"] == majority
    assert score_math_verify("so what", "3").pred == ""


@pytest.mark.parametrize("text", NASTY)
def test_hostile_text_is_read_in_no_time(text):
    """The library may take longer: it runs in workers with limits."""
    start = time.thread_time()
    for answer in (answer_or_box(text), answer_or_box(f"\\boxed{{{text[:280]}}}"), text[:300]):
        numbers_of(plain_notation(answer))
    assert time.thread_time() - start < 0.05
    assert score_math_verify(text, "6").acc == 0
