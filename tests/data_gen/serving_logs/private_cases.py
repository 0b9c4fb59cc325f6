"""Sentences and code with secrets in them, and such that only look so: the table that redaction is measured by.

In a secret line the part between « and » must not be kept. Scanners of repositories must find no key here, so the random part of one is written
by its form: `{A36}` 36 letters and digits, `{h32}` hexadecimal, `{a20}` small letters and digits, `{U16}` capitals and digits, `{L34}` letters,
`{B43}` with - and _, `{d10}` digits, `{b88}` base64. ¦ stands for nothing. Lines above the mark were written before the rules, those below it after
them and without a look at what fails (then 93 of 100 were caught and 2 of 82 changed).
"""

from __future__ import annotations

import random
import re
import string

LETTERS, DIGITS = string.ascii_letters, string.digits
ALPHABETS = {
    "A": LETTERS + DIGITS,
    "h": "0123456789abcdef",
    "a": string.ascii_lowercase + DIGITS,
    "U": string.ascii_uppercase + DIGITS,
    "L": LETTERS,
    "B": LETTERS + DIGITS + "-_",
    "d": DIGITS,
    "b": LETTERS + DIGITS + "+/",
}
MARK = "----"


def cases(table: str) -> list[str]:
    """Return the lines of a table with their random parts drawn, always the same ones."""
    return [_drawn(line, number) for number, line in enumerate(table.strip("\n").split("\n")) if line != MARK]


def num_before_the_mark(table: str) -> int:
    return table.strip("\n").split("\n").index(MARK)


def _drawn(line: str, number: int) -> str:
    rng = random.Random(number)

    def part(match: re.Match[str]) -> str:
        return "".join(rng.choices(ALPHABETS[match[1]], k=int(match[2])))

    return re.sub(r"\{([AhaULBdb])(\d+)\}", part, line).replace("¦", "").replace("\\n", "\n")


SECRETS = r"""
Write to «anna.schmidt@firma-beispiel.de» before Friday.
mailto:«j.o'brien+work@sub.mail.example.co.uk»?subject=hi
Mein Kollege ist unter «jörg@müller-söhne.de» erreichbar.
联系邮箱:«李雷@例子.中国»
पता «अजय@डाटा.भारत» है
const owner = "«dev.team@startup.io»";
From: Bob <«bob_1987@mail.ru»>
"«"very odd"@example.org»" is an address too
reach me at «maria [at] correo [dot] es»
user «иван.петров@почта.рф» вошёл
«someone@xn--bcher-kva.example» bought it
Call me at «+1 415 555 2671» tomorrow
Ring «020 7946 0958» and ask for Jo
Meine Nummer: «0171 2345678»
Tel.: «030/12345678»
appelle-moi au «06 12 34 56 78»
numéro de téléphone «+33 1 42 68 53 00»
Llámame al «612 34 56 78»
telefone «(11) 91234-5678»
звоните «8 (495) 123-45-67»
電話は«03-1234-5678»です
手机«138 1234 5678»
phone «98765 43210»
(office) «(212) 555-0187», ask for Sam
Fax «0049 30 1234567»
whatsapp «+55 21 98765-4321»
mobile: «0412 345 678»
연락처 «010-1234-5678»
export GITHUB_TOKEN=«gh¦p_{A36}»
git clone https://«gh¦o_{A36}»@github.com/me/private.git
glab auth login -t «gl¦pat-{B20}»
//registry.npmjs.org/:_authToken=«np¦m_{A36}»
pypi: password = «py¦pi-AgEIcHlwaS5vcmc{B80}»
AZURE_CLIENT_SECRET=«{A3}8¦Q~{B34}»
DefaultEndpointsProtocol=https;AccountName=store1;AccountKey=«{b86}==»;EndpointSuffix=core.windows.net
sendgrid = "«S¦G.{B22}.{B43}»"
slack bot token «xo¦xb-{d12}-{d12}-{A24}»
post to «https://hooks.sl¦ack.com/services/T{U8}/B{U8}/{A24}»
stripe.api_key = '«sk_l¦ive_{A24}»'
curl https://api.openai.com/v1/models -H "Authorization: Bearer «sk-pr¦oj-{B74}»"
ANTHROPIC_API_KEY="«sk-a¦nt-api03-{B93}»"
huggingface-cli login --token «h¦f_{L34}»
aws_access_key_id = «AK¦IA{U16}»
aws_secret_access_key = «{b40}»
key=«AI¦za{B35}»&zoom=3
TWILIO_AUTH_TOKEN: «{h32}»
account «A¦C{h32}» from twilio
client.run("«M{A23}.{A6}.{B38}»")  # discord
bot = Bot("«{d9}:A¦A{B33}»")
jwt «ey¦J{A34}.ey¦J{A60}.{B43}»
-----BEGIN RSA PRIV¦ATE KEY-----\n«{b64}»\n{b64}\n-----END RSA PRIVATE KEY-----
"private_key": "-----BEGIN PRIV¦ATE KEY-----\\n«{b64}»\\n{b64}\\n-----END PRIVATE KEY-----\\n"
-----BEGIN OPENSSH PRIV¦ATE KEY-----\n«{b70}»\n{b70}
postgresql://app:«Tr0ub4dor&3»@db.internal:5432/prod
redis://:«p4ssw0rd-of-redis»@cache:6379/0
mongodb+srv://admin:«q9!kLm2z»@cluster0.mongodb.net/test
password: «hunter2»
Passwort: «Sommer2024!»
contraseña: «gatito123»
mot de passe : «Azerty!987»
пароль: «Qwerty123»
密码:«abc123456»
パスワードは«sakura2020»です
senha = "«flamengo10»"
The wifi password is «BlueHorse42», please share it.
client_secret=«{A32}»
{"username": "root", "password": "«toor-toor»"}
DB_PASSWORD=«correcthorse»
$config['db_pass'] = '«s3rv3rP4ss»';
<add key="apiKey" value="x"/><password>«Geheim123»</password>
Server=db1;User Id=sa;Password=«Str0ng!Pass»;Encrypt=true
mysql --user=root --password=«letmein!9»
curl -u admin:«S3cur3P@ss» https://intranet/api
Cookie: sessionid=«{a32}»; theme=dark
https://bucket.s3.amazonaws.com/f.zip?X-Amz-Signature=«{h64}»
https://acct.blob.core.windows.net/c/f?sv=2022-11-02&sig=«{b40}%3D»
Card «4111 1111 1111 1111» exp 12/27
Mastercard «5555555555554444»
IBAN «DE89 3704 0044 0532 0130 00»
virement sur «FR1420041010050500013M02606»
failed login from «81.2.69.142» port 22
«2a02:8108:8ac0:2d8:a1b2:c3d4:e5f6:7890» connected
server at «198.51.100.23:8080» answered
----
Bitte an «k.weiß@straße-post.example» antworten
Pour info : «léa.dupont@exemple.fr», merci
«user+tag@gmail.com», cc
Kontakt: «p.nowak@uczelnia.edu.pl».
"email": "«sales@acme-corp.com.au»",
メールは«taro.yamada@kaisha.co.jp»まで
회신은 «minsu@naver.com» 으로
author_email='«maintainer@python-lib.org»'
<«noreply@status.hosting.cloud»>
(«ΓΙΩΡΓΟΣ@παράδειγμα.ελ»)
ping jane(at)widgets(dot)«com» hmm
contact us: «support@fintech.app»!
SELECT * FROM users WHERE mail = '«li.wei@163.com»';
Tel «+86 138 0013 8000»
«+81-90-1234-5678» は私の番号
+1-«800-555-0199» is the hotline
Dial «+91 98765 43210» for Ravi
Sprechstunde unter «0221 / 4701234»
Mobil 0«151-23456789»
Natel «079 123 45 67»
Rappelez le «01.42.68.53.00» ce soir
movil: «+34 612345678»
celular (21) «98765-4321»
cell: «415.555.2671»
my number is «(646) 555-0123»
ligar para «11 3456-7890», telefone
Telefono «06 6982 1234»
WhatsApp 00«44 7700 900123»
тел. «+7 912 345-67-89»
telefoon «06-12345678»
sms til «+47 412 34 567»
Handy «0176/55512345»
GH_PAT=«gith¦ub_pat_{A22}_{A59}»
https://x-access-token:«gh¦s_{A36}»@github.com/o/r
CI_JOB_TOKEN=«gl¦cbt-64_{B20}»
NPM_TOKEN: "«np¦m_{A36}»"
TWINE_PASSWORD=«py¦pi-AgEIcHlwaS5vcmc{B120}»
tenant secret «{A3}7¦Q~{B33}» for the app
SharedAccessKeyName=Root;SharedAccessKey=«{b43}=»
Authorization: Bearer «S¦G.{B22}.{B43}»
SLACK_APP=«xap¦p-1-A{U10}-{d13}-{h64}»
webhook «https://discord.com/api/web¦hooks/{d18}/{B68}»
STRIPE_WEBHOOK_SECRET=«wh¦sec_{A32}»
const stripe = Stripe("«pk_te¦st_{A24}»")
openai.api_key = "«s¦k-{A20}T3¦BlbkFJ{A20}»"
groq key: «gs¦k_{A52}»
token «h¦f_{L37}» works
AWS_SECRET_ACCESS_KEY: "«{b40}»"
aws session: «AS¦IA{U16}»
"private_key_id": "x", "api_key": "«AI¦za{B35}»"
TWILIO: «S¦K{h32}»
DISCORD_TOKEN=«MT{A24}.{A6}.{B38}»
https://api.telegram.org/bot«{d10}:A¦AH{B32}»/getMe
id_token=«ey¦J{A30}.ey¦J{A80}.{B86}»
access_token: "«ya¦29.a0A{B120}»"
refresh «1//0¦g{B60}» saved
"client_secret": "«GOC¦SPX-{B28}»"
VAULT_TOKEN=«hv¦s.{A24}»
databricks «da¦pi{h32}»
MAILGUN=«ke¦y-{h32}»
mailchimp «{h32}-us¦14»
DO_TOKEN=«dop¦_v1_{h64}»
shopify: «shp¦at_{h32}»
-----BEGIN EC PRIV¦ATE KEY-----\n«{b64}»\n{b40}\n-----END EC PRIVATE KEY-----
mysql://root:«my$qlR00t»@10.0.0.3:3306/app
amqp://guest:«Gu3stPw»@rabbit/vhost
ftp://backup:«b4ckup»@files.example.org/x
https://admin:«P%40ssw0rd»@panel.example.com
jdbc:postgresql://h/db?user=me&password=«z8Xw!q»
Password = «Winter-2023»
Mein Kennwort lautet «Igel77!».
la contraseña es «perro2021»
Le mot de passe est «Chat2022!»
Parola: «Gatto_99»
şifre: «Kedi1234»
hasło: «Zima2023!»
비밀번호: «nabi1234!»
密碼:«Taipei2019»
"pwd":"«qwe123!@#»"
spring.datasource.password=«Db9xKq2»
os.environ["API_TOKEN"] = "«{A40}»"
X-Api-Key: «{A32}»
api-key: «{h32}»
JWT_SECRET='«{b44}»'
PIN: «4821»
sshpass -p '«L1nux!»' ssh host
./deploy --token «{A30}» --env prod
Authorization: Basic «{b24}==»
Set-Cookie: auth=«{A40}»; HttpOnly
https://storage.googleapis.com/b/o?X-Goog-Signature=«{h128}»
https://app.example.com/reset?token=«{A32}»
Amex «3782 822463 10005»
card_number: «4000056655665556»
Visa-Nummer «4012-8888-8888-1881»
IBAN: «GB29 NWBK 6016 1331 9268 19»
konto «PL61109010140000071219812874»
reken. «NL91ABNA0417164300»
X-Forwarded-For: «93.184.216.34»
blocked «45.33.32.156», retry
AAAA «2606:2800:220:1:248:1893:25c8:1946»
mysqldump -uroot -p«Rt56yhQ1» db > d.sql
docker login -u bob -p «Zx81spec!» registry.example
ldapsearch -x -D cn=admin -w «Ldap!234x» -b dc=x
redis-cli -h cache -a «r3d1sPwAAx9» ping
unzip -P «Unz1pP4ss» backup.zip
smbclient //host/share -U user%«Smb4pass!»
My social security number is «219-09-9999».
SSN: «536-22-8726»
passport no. «C01X00T47»
BSN: «111222333»
driver's license number: «D1234-56789-12345»
{"auths": {"registry.example": {"auth": "«dXNlcjpwYXNzLXdvcmQ5OQ==»"}}}
//registry.npmjs.org/:_auth=«bnBtdXNlcjpodW50ZXIyMng=»
PresharedKey = «{b43}=»
network={ssid="home" psk="«blueGiraffe77»"}
seed phrase: «legal winner thank year wave sausage worth useful legal winner thank yellow»
private key 0x«{h64}»
"login": "me", "pass": "«qwe123RTY»"
the OTP is «482913»
CVV: «482»
pw: «Blaue7Katze»
pass: «Hello123!»
nuget «oy¦2{a43}»
cargo login «ci¦o{A32}»
airtable «pa¦t{A14}.{h64}»
algolia admin key «{h32}»
NINO «QQ 12 34 56 C»
CPF: «111.444.777-35»
Steuer-ID: «86095742719»
pul¦umi «pu¦l-{h40}»
access_token$production$«{a16}$¦{h32}»
"""

INNOCENT = r"""
token=tokenizer.eos_token_id
git clone git@github.com:org/repo.git
struct sk_buff *skb = sk_buff_alloc_headroom_with_flags(dev);
def login(user: str, password: str) -> Token:
api_key=os.environ["OPENAI_API_KEY"]
password = getpass.getpass("Password: ")
commit 9fceb02d0ae598e95dc970b74767f19372d61af8
uuid 550e8400-e29b-41d4-a716-446655440000
requests==2.31.0 and urllib3>=1.26.18,<3
The eos_token is </s> and the pad_token is <pad>.
next_token = torch.argmax(logits[:, -1, :], dim=-1)
npm install lodash@4.17.21 react@18.2.0
@pytest.mark.parametrize("a,b", [(1, 2)])
y = x @ self.weight.T + self.bias
attn = q@k.transpose(-2, -1)
background: url(logo@2x.png)
password: ${DB_PASSWORD}
password: <your password here>
API_KEY=your_api_key_here
secret: {{ .Values.secret }}
127.0.0.1:8000
http://192.168.1.10/admin
inet 10.0.0.5 netmask 255.255.255.0
nameserver 8.8.8.8
fe80::1ff:fe23:4567:890a%eth0
std::vector<std::string> v;
Chrome/120.0.6099.109 Safari/537.36
version 1.2.3.4 of the library
tel = soup.find("tel")
The year 2024 had 366 days; 1234567890 seconds passed.
timestamp: 1700000000000
pi = 3.14159265358979323846
2024-01-15 12:34:56.789
ISBN 978-3-16-148410-0
1 000 000 + 2 500 000 = 3 500 000
0x7fff5fbff8c0
01 02 03 04 05 06 07 08
sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
integrity="sha384-oqVuAfXRKap7fdgcCY5uykM6+R9GqQ8K/uxy9rx7HNQlGYl1kPzQho1wx4JwY8wC"
if token == "abc": return None
max_tokens: 4096
"token": "##ing", "id": 1234
for token in tokens: print(token)
self.token = token
const { token } = req.body;
csrfToken: document.querySelector('meta[name="csrf-token"]').content
user.password = hash_password(form.password.data)
"password": {"type": "string", "minLength": 8}
passwords must have at least 8 characters
Enter your password:
password: required
The secret of good bread is time.
secret = random.randint(1, 100)
SECRET_KEY = config("SECRET_KEY")
private_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
if line.startswith("-----BEGIN PRIVATE KEY-----"):
-----BEGIN PUBLIC KEY-----
Bearer tokens are sent in a header.
Authorization: Bearer <token>
headers = {"Authorization": f"Bearer {token}"}
chatcmpl-abc123 finished
bert-base-uncased-finetuned-sst-2-english
sk-learn is spelled scikit-learn
https://example.com/path?page=2&sort=asc
https://github.com/org/repo/blob/main/src/file.py#L10-L20
postgres://user:password@localhost/db
postgresql://${USER}:${PASS}@${HOST}/db
primary_key=True, foreign_key=None
cache_key = f"user:{user_id}:v2"
key: value
The key to success is practice
order 4111111111111112 was shipped
row 1234567812345678 of the table
GB82 is a postcode area? No, AB12 3CD is.
Section 3.2.1.4 describes the protocol
ssh root@server1 'ls'
rsync -av build/ deploy@host.example.com:/var/www/
model = AutoModel.from_pretrained("meta-llama/Llama-3.1-8B")
int8_matmul_dequantize_blockwise_kernel_v2
f = lambda x: x ** 2 - 4 * x + 1234567
----
token = tokens[i + 1]
tokenizer.pad_token = tokenizer.eos_token
pad_token_id=151643
fix: reject expired tokens (#4821)
origin	git@gitlab.example.com:group/sub/project.git (fetch)
ssh://git@bitbucket.org/team/repo.git
skb_put(skb, len); sk_free(sk);
sk_lookup_reuseport_select_prog2(ctx, sk)
pk_index = table.primary_key.columns[0]
const hfModel = "hf_transformers_model_for_causal_lm";
npm_config_registry=https://registry.npmjs.org/
pip install "torch>=2.1.0,<3" --index-url https://download.pytorch.org/whl/cu121
pypi-server listens on port 8080
class PasswordField(forms.CharField):
password = models.CharField(max_length=128)
password=None, token=None
if password != confirm_password:
<input type="password" name="password" placeholder="Password">
"password": "Passwort",
label_password: Mot de passe
String password = request.getParameter("password");
password: !env_var DB_PASSWORD
password: ${{ secrets.PYPI_TOKEN }}
with: { token: ${{ github.token }} }
client_secret = settings.OAUTH_CLIENT_SECRET
secretKeyRef: {name: db, key: password}
apiKey: process.env.API_KEY,
api_key: Optional[str] = None
export API_KEY=<insert key>
aws_access_key_id = YOUR_ACCESS_KEY
token: ${TOKEN}
access_token = response.json()["access_token"]
auth_token = self._make_auth_token(user)
session_id = uuid4().hex
signature = inspect.signature(function)
signature: (a: int, b: int) -> int
credentials = service_account.Credentials.from_file(path)
Basic usage: see below.
basic auth is disabled
The bearer of this letter is my friend.
d41d8cd98f00b204e9800998ecf8427e  empty.txt
index 83db48f..bf2a1c9 100644
go.sum h1:3XvKtTOCDYo0aXG9oNWFFiQ8v7y2p6q1VGQdvYbPEM8=
docker.io/library/python@sha256:0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9
request id req_011CSHoEeqs5C35K2UUqR7Fy
"id": "chatcmpl-9aBcDeFgHiJkLmNoPqRsTuVwXyZ01"
https://www.youtube.com/watch?v=dQw4w9WgXcQ
https://arxiv.org/abs/2401.15077v2
https://docs.google.com/document/d/1BxiMVs0XRA5nFMdKvBdBZjgmUUqptlbs74OgVE2upms/edit
data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk
AutoModelForSequenceClassificationWithPooling2d
A3F5 9C21 77B0 4D18
0 1 1 2 3 5 8 13 21 34 55 89
0.123 0.456 0.789 1.012
[0.0012, 0.0345, 12.5, 100.25]
12/25/2024 10:30 AM
25.12.2024 um 18:00 Uhr
2024-02-29T23:59:59.999Z
from 09:00-17:30 on 01-02-2024
lines 100-200 and 300-400
ISO 8601-1:2019 and RFC 9110
part no. 555-1234-B
tracking 1Z999AA10123456784
EAN 4006381333931
DOI 10.1000/182 and 10.1145/3292500.3330701
chr7:55,191,822-55,191,822
Call me Ishmael. 1851 was the year.
The call returned 404 after 1500 ms
phone: str = ""
mobile-first design since 2010
listen 0.0.0.0:80
subnet 172.16.0.0/12 via 172.16.0.1
ping 1.1.1.1
::1 localhost ip6-localhost
a[::2], b[1::3]
assembly version 10.0.19041.1
torch.backends.cuda.matmul.allow_tf32 = True
x@w.T + b@c.T
@app.route("/users/<int:id>")
@types/node@20.11.5
user@host:~$ ls -la
In 4 x 4 x 4 x 4 cubes 5500 0000 holes
docker run -d -p 127.0.0.1:5432:5432 postgres
mysql -u root -p mydb
mysql -u root -p
redis-cli -a $REDIS_PASSWORD ping
cp -p file1 file2
ssh -p 2222 host
nc -w 5 host 80
tar -P -xf a.tar
auth = HTTPBasicAuth(user, password)
"auth": "bearer"
auth: required
passport = Passport(app)
pan = tilt + 12345678
PASS: test_foo (0.01s)
the security code path is 3 calls deep
ssn = models.CharField(max_length=11)
"pass": "passed"
pass=1
pw = pooled_width
cos 45 and sin 1234567890
pan = 4026531840
zip -r -P out.zip dir
helm install -p values.yaml
recovery phrase length must be 12
Erlang/OTP 26 released
die 12345678 Einwohner
nie 12345678 mal
"""
